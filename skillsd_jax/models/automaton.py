class Automaton: pass
