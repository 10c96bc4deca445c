"""``--help`` and ``--help-all`` of ``fit`` and of the commands with its settings."""

import re
import shlex
from collections.abc import Callable

import pytest
from jsonargparse import ArgumentParser

from gpt_lightning.cli.help_format import readable_type
from gpt_lightning.cli.main import VERBS_WITH_SHORT_HELP, main
from gpt_lightning.cli.plan import PlanCLI
from gpt_lightning.cli.short_help import EXAMPLES, GROUPS
from gpt_lightning.cli.training_cli import TrainingCLI
from helpers import ROOT, Command

each_verb = pytest.mark.parametrize("verb", VERBS_WITH_SHORT_HELP)


def parser_of(verb: str) -> ArgumentParser:
    return (PlanCLI([]) if verb == "plan" else TrainingCLI(verb, [], None)).parser


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Output of a command that argparse ends after it has printed a help or the settings."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 0
        return capsys.readouterr().out

    return run


def entries(text: str) -> dict[str, str]:
    """Setting → its text in a short help, on one line."""
    found = re.findall(r"^  --(\S+) +(.+(?:\n {10,}.+)*)", text, re.M)
    return {name: " ".join(rows.split()) for name, rows in found}


@each_verb
def test_help_fits_on_one_screen(command: Command, verb: str) -> None:
    result = command(*verb.split(), "--help")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert len(lines) <= 39  # a terminal of 40 lines also shows the prompt
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: gpt_lightning {verb} ")
    assert "--help-all" in lines[-1]


@each_verb
def test_help_is_printed_wherever_it_is_asked_for(command: Command, verb: str) -> None:
    shown = command(*verb.split(), "--help").out
    for arguments in (["-h"], ["--config", "nowhere.yaml", "-h"], ["--help", "--model.lrr=1"]):
        assert command(*verb.split(), *arguments).out == shown


@each_verb
def test_help_agrees_with_the_parser(command: Command, verb: str) -> None:
    """It is made without the parser, so descriptions and defaults are compared."""
    actions = {action.dest: action for action in parser_of(verb)._actions}
    shown = entries(command(*verb.split(), "--help").out)
    assert [*shown] == " ".join(GROUPS[verb].values()).split()
    del shown["quiet"]  # main takes it out of the arguments
    for name, text in shown.items():
        assert f"--{name}" in actions[name].option_strings
        sentence, _, default = text.removesuffix("]").partition(" [")
        assert re.match(re.escape(sentence) + r"[.;]( |$)", str(actions[name].help)), name
        if default:
            value = actions[name].default
            assert default == (str(value).lower() if isinstance(value, bool) else str(value)), name


def test_help_has_defaults(command: Command) -> None:
    shown = entries(command("fit", "--help").out)
    assert shown["data.batch_size"].endswith(" [2]")
    assert shown["model.lr"].endswith(" [0.0004]")
    assert shown["model.config.emb_dim"].endswith(" [768]")
    assert shown["evaluation.eval_freq"].endswith(" [5]")


@each_verb
def test_examples_of_help_are_accepted(
    command: Command,
    printed: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    shown = command(*verb.split(), "--help").out
    monkeypatch.chdir(ROOT)
    for example in EXAMPLES[verb]:
        assert f"\n  python -m gpt_lightning {example}\n" in shown
        assert "\ndata:\n" in printed(*shlex.split(example), "--print_config")


@each_verb
def test_complete_help_has_every_setting(printed: Callable[..., str], verb: str) -> None:
    shown = printed(*verb.split(), "--help-all")
    assert shown.startswith(f"usage: gpt_lightning {verb} ")
    settings = parser_of(verb).get_defaults().keys(nested=True)
    assert {"model.lr", "data.mixture", "trainer.max_time", "checkpoint.save_best"} <= {*settings}
    described = set(re.findall(r"(?:^  |, |--> )-{0,2}([\w.]+)", shown, re.M))
    assert not {*settings} - described
    for markup in ("``", ":class:", ":paramref:", "Optional[", "Literal[", "default: True"):
        assert markup not in shown


def test_complete_help_of_verify_resume_is_that_of_fit(printed: Callable[..., str]) -> None:
    assert printed("verify-resume", "--help-all") == printed("fit", "--help-all")


def test_mistakes_name_the_help_that_has_every_setting(command: Command) -> None:
    assert "see gpt_lightning fit --help-all" in command("fit", "--xyzzyqqq=1").err
    assert "see gpt_lightning generate --help\n" in command("generate", "--xyzzyqqq=1").err


def test_types_are_written_as_in_yaml() -> None:
    for given, plain in {
        "Optional[int]": "int or null",
        "Optional[dict[str, float]]": "dict[str, float] or null",
        "Union[Literal['a', 'b'], null]": "a or b or null",
        "dict[str, int] | null": "dict[str, int] or null",
        "tuple[float, float]": "tuple[float, float]",
    }.items():
        assert readable_type(given) == plain
