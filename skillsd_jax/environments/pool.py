import dataclasses
from typing import Any
@dataclasses.dataclass(frozen=True)
class Outcome:
    step: Any=None
    task: Any=None
    fault: str=""
    message: str=""
class Pending:
    def __init__(self, v): self.v=v
    def result(self): return self.v
FAULTS = (RuntimeError, ValueError, LookupError, OSError, TypeError, AttributeError, AssertionError, ArithmeticError)
class Inline:
    def __init__(self, envs): self.envs=envs; self.count=len(envs); self.local=envs[0]; self.max_steps=envs[0].max_steps; self.data=envs[0].data
    def _do(self, f):
        try: return f()
        except FAULTS as e: return Outcome(fault="error", message=repr(e))
    def reset(self, slots, seeds):
        def one(i,s):
            st=self.envs[i].reset(s); return Outcome(st, self.envs[i].task())
        return Pending([self._do(lambda: one(i,int(s))) for i,s in zip(slots,seeds)])
    def step(self, slots, texts):
        return Pending([self._do(lambda: Outcome(self.envs[i].step(t))) for i,t in zip(slots,texts)])
    def close(self): pass
Stage=Inline
@dataclasses.dataclass(frozen=True)
class Maker:
    name: str
    split: str
    options: dict
    def __call__(self):
        from skillsd_jax.environments import ENVIRONMENTS
        return ENVIRONMENTS[self.name](split=self.split, **self.options)
def staged(x): return x if isinstance(x, Inline) else Inline(x)
def open_stage(maker,count,setting): return Inline([maker() for _ in range(count)])
