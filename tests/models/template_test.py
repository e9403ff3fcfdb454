"""What a folder's chat template may do, and that prompts never follow its rewriting."""

import json
import subprocess
import sys

import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import prompts
from skillsd_jax.environments.base import TimeStep
from skillsd_jax.models import tokenizer
from skillsd_jax.trajectory import Role, Task
from tests.models.folders import CHATML, FORGETFUL, POLITE, QUIET, THINKER

TASK = Task("fake", 3, "train", "fetch", instruction="look for one apple")
WAYS = ("string", "list", "file")


def prompter(words, **options):
    sizes = {"max_prompt_length": 1000, "max_skill_length": 200, "max_length": 4000}
    return prompts.Prompter(words, settings.Prompt(**(sizes | options)))


def ids_of(segments):
    return [int(id) for segment in segments for id in segment.tokens]


def rendered(words, messages, **options):
    options = {"add_generation_prompt": True} | options
    return words.hf.apply_chat_template(messages, **options)["input_ids"]


def asked(text="at: fridge 1"):
    return {"role": "user", "content": f"{TASK.instruction}\n{text}"}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("how", WAYS)
def test_a_prompt_is_what_the_template_renders(kind, how, folder):
    for template, system in ((CHATML, ""), (POLITE, QUIET), (FORGETFUL, "")):
        words = tokenizer.load(folder(kind, template, how))
        assert words.default_system == system
        opening, _ = prompter(words).opening(TASK, TimeStep("at: fridge 1"))
        assert ids_of(opening) == rendered(words, [asked()])
        assert (opening[0].role == Role.SYSTEM) == bool(system)
        given = {"role": "system", "content": "be brief"}
        opening, _ = prompter(words, system="be brief").opening(
            TASK, TimeStep("at: fridge 1")
        )
        assert ids_of(opening) == rendered(words, [given, asked()])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_thinking_off_is_the_templates_empty_thought(kind, folder):
    words = tokenizer.load(folder(kind, FORGETFUL))
    for thinking in (True, False):
        maker = prompter(words, thinking=thinking)
        opening, _ = maker.opening(TASK, TimeStep("at: fridge 1"))
        theirs = rendered(words, [asked()], enable_thinking=thinking)
        assert ids_of(opening) == theirs
    assert len(theirs) > len(rendered(words, [asked()]))


def refused(folder, template, *named, kind="bpe", how="file"):
    path = folder(kind, template, how)
    with pytest.raises(ValueError) as fault:
        _ = tokenizer.load(path).default_system
    file = "chat_template.jinja" if how == "file" else "tokenizer_config.json"
    for part in (str(path / file), *named):
        assert part in str(fault.value)
    assert "Traceback" not in str(fault.value) and fault.value.__cause__ is None


TURNED = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OTHERWISE = {
    "another format": (TURNED + GENERATE, "<|im_start|>user", "[user]one question"),
    "no generation prompt": (CHATML.split("{% if")[0], "<|im_start|>assistant", "came"),
    "a token in front": ("{{ '<s>' }}" + CHATML, "came '<s><|im_start|>user"),
    "a text behind": (CHATML + "{{ 'Sure,' }}", "Sure,"),
    "no line end": (CHATML.replace("<|im_end|>\n", "<|im_end|>"), "<|im_end|><|im_"),
    "answers named otherwise": (
        CHATML.replace("m.role", "('model' if m.role == 'assistant' else m.role)"),
        "<|im_start|>model",
    ),
    "only the last turn": (CHATML.replace("in messages", "in messages[-1:]"), "came"),
    "a system message of its own beside ours": (
        CHATML.replace("m.content", "m.content + ('!' if m.role == 'system' else '')"),
        "be brief!",
    ),
    "an empty system turn": (
        "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\n<|im_end|>\n' }}{% endif %}" + CHATML,
        "came '<|im_start|>system\\n<|im_end|>",
    ),
    "another empty thought": (
        FORGETFUL.replace("\n\n</think>", "</think>"),
        "enable_thinking=False",
        "<think></think>",
    ),
    "another system message when it does not think": (
        "{% if enable_thinking is false %}{{ '<|im_start|>system\nno<|im_end|>\n' }}"
        "{% endif %}" + CHATML,
        "enable_thinking=False",
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_frame_is_refused_with_both(name, folder):
    template, *named = OTHERWISE[name]
    refused(folder, template, "expected", *named)


@pytest.mark.parametrize("how", ["string", "file"])
def test_a_template_that_always_thinks_is_refused_as_that(how, folder):
    refused(folder, THINKER, "opens a thought before every reply", how=how)
    always = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
    refused(folder, always, "opens a thought before every reply", how=how)


@pytest.mark.parametrize(
    "template, named",
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only of dogs') }}", "only of dogs"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
            "{% endif %}" + CHATML,
            "fails on a conversation of system, user: TemplateError: no system",
        ),
    ],
)
def test_a_template_that_fails_is_named(template, named, folder):
    refused(folder, template, named)


@pytest.mark.parametrize("how", ["nothing", "list"])
def test_a_folder_without_a_template_is_refused_by_name(how, folder):
    path = folder(template=None, how=how)
    with pytest.raises(ValueError, match=r"has no chat template: .* instruct model"):
        _ = tokenizer.load(path).default_system
    empty = folder(template=" \n", how="file")
    with pytest.raises(ValueError, match="has no chat template"):
        _ = tokenizer.load(empty).default_system


@pytest.mark.parametrize("kind", ["unigram that leads", "unigram that leads always"])
def test_a_tokenizer_that_puts_a_space_before_turns_is_refused(kind, folder):
    refused(folder, CHATML, "space before every text", kind=kind)


def test_a_settings_file_that_is_no_json_is_named(folder):
    path = folder()
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        tokenizer.load(path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("thinking", [True, False])
def test_what_was_sampled_is_fed_again_whatever_a_template_would_make_of_it(
    kind, thinking, folder
):
    """Two spellings that no encoder gives, and a thought the template drops."""
    words = tokenizer.load(folder(kind, FORGETFUL))
    maker = prompter(words, context="whole", thinking=thinking)
    letters = [id for letter in "look" for id in words.encode(letter)]
    thought = [*words.encode("<think>\n"), *letters, *words.encode("</think>\n\n")]
    said = [*thought, *words.encode("ques"), *words.encode("tion"), words.stop_id]
    assert words.encode(words.decode(said)) != said[:-1]  # as text it is other ids
    segments = list(maker.opening(TASK, TimeStep("at: fridge 1"))[0])
    segments.append(maker.reply(said, np.zeros(len(said))))
    first = ids_of(segments)
    segments.append(maker.following(TimeStep("one look")))
    segments.append(maker.reply(letters, np.zeros(4)))
    segments.append(maker.following(TimeStep("the end"), stopped=False))
    ask = words.open_turn("assistant")
    ask += [] if thinking else words.encode(words.no_thought)
    between = [*words.encode("\n"), *words.open_turn("user"), *words.encode("one look")]
    between += [*words.close_turn(), *ask]
    last = [*words.close_turn(), *words.open_turn("user"), *words.encode("the end")]
    fed = [*first, *between, *letters, *last, *words.close_turn(), *ask]
    assert ids_of(segments) == fed
    assert fed[: len(first)] == first and first[-len(said) :] == said
    scored = [s.scored for s in segments for _ in s.tokens]
    mine = [id for id, scored in zip(fed, scored) if scored]
    assert mine == [*said, *letters]
    # The template would drop the thought: its history is not what was sampled.
    history = [
        asked(),
        {"role": "assistant", "content": words.decode(said)},
        {"role": "user", "content": "one look"},
    ]
    theirs = rendered(words, history, enable_thinking=thinking)
    assert theirs[: len(first)] != first
    assert words.decode(theirs).count("<think>") == (not thinking)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("template", [POLITE, FORGETFUL])
def test_an_exported_folder_works_with_transformers(
    kind, how, template, folder, tmp_path
):
    from transformers import AutoTokenizer

    path, out = folder(kind, template, how, model_max_length=77), tmp_path / "out"
    tokenizer.load(path).save(out)
    original, exported = map(AutoTokenizer.from_pretrained, (path, out))
    messages = [asked(), {"role": "assistant", "content": "<think>a</think>look"}]
    for options in ({}, {"enable_thinking": False}):
        options |= {"add_generation_prompt": True}
        expected = original.apply_chat_template(messages, **options)["input_ids"]
        assert (
            exported.apply_chat_template(messages, **options)["input_ids"] == expected
        )
    assert exported.eos_token == "<|im_end|>" and exported.model_max_length == 77
    kept = json.loads((out / "tokenizer_config.json").read_text())
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = tokenizer.load(out)
    assert again.default_system == tokenizer.load(path).default_system
    assert again.means(tokenizer.load(path))


def test_tokens_named_in_the_older_file_are_exported(folder, tmp_path):
    from transformers import AutoTokenizer

    path, out = folder(), tmp_path / "out"
    content = {"content": "<|endoftext|>", "lstrip": False, "rstrip": False}
    older = {"eos_token": content, "pad_token": "<|im_end|>"}
    (path / "special_tokens_map.json").write_text(json.dumps(older))
    words = tokenizer.load(path)
    words.save(out)
    assert words.pad_id == words.stop_id
    for each in (path, out):
        named = AutoTokenizer.from_pretrained(each)
        assert (named.eos_token, named.pad_token) == ("<|endoftext|>", "<|im_end|>")


def test_a_qwen_folder_exports_as_one(folder, tmp_path):
    """Its class builds the backend anew from the vocabulary and the merges."""
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    tokenizer.load(folder(tokenizer_class="Qwen2Tokenizer")).save(out)
    exported = AutoTokenizer.from_pretrained(out)
    assert type(exported).__name__.startswith("Qwen2Tokenizer")
    words = tokenizer.load(out)
    ids = exported.apply_chat_template([asked()])["input_ids"]
    assert ids == rendered(words, [asked()], add_generation_prompt=False)


def test_transformers_is_imported_for_a_folders_template_only(folder):
    heavy = "{'jax', 'torch', 'transformers'} & set(sys.modules)"
    program = (
        "import sys; from skillsd_jax.models import tokenizer\n"
        "words = tokenizer.train(['some text'], [])\n"
        f"assert words.default_system == '' and not {heavy}\n"
        f"words.save({str(folder())!r})\n"
        f"words = tokenizer.load({str(folder('bpe', POLITE))!r})\n"
        f"words.decode(words.encode('a')); assert not {heavy}\n"
        f"assert words.default_system == {QUIET!r}\n"
        f"assert {heavy} == {{'transformers'}}, {heavy}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
