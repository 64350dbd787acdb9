"""The command `ssl-vit`: the fronts in scripts/ for those who installed the package.

`ssl-vit pretrain mae ...` takes the flags of scripts/pretrain_mae.py and does the same.
"""

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ssl_vit import __version__
from ssl_vit.core import front as core_front
from ssl_vit.core.front import FlagParser, nearest
from ssl_vit.core.shipped import find_config, folder

OBJECTIVES = sorted(path.stem.removeprefix("pretrain_") for path in folder("scripts").glob("pretrain_*.py"))
TRAINING = {f"pretrain {name}": f"pretrain_{name}" for name in OBJECTIVES} | {
    name: name for name in ("distill", "finetune")
}
PARALLEL = TRAINING | {
    "probe knn": "evaluate_knn",
    "probe linear": "linear_probe",
    "probe attentive": "attentive_probe",
    "segment": "evaluate_segmentation",
    "retrieve": "evaluate_retrieval",
    "extract": "extract_features",
}
"""Commands that several processes can share, and the front of each."""
FRONTS = PARALLEL | {name: name for name in ("export", "visualize", "report", "doctor")}
USAGE = f"""\
usage: ssl-vit COMMAND [FLAGS]

train
  pretrain OBJECTIVE   on images without labels: {", ".join(OBJECTIVES)};
                       without flags the quickstart runs
  distill              a trained backbone into another, without labels
  finetune             on labelled images, all weights of a backbone
judge
  probe knn|linear|attentive   frozen features, on labelled images
  segment, retrieve            the same, on masks; by nearest neighbours
use and look
  extract              features of images into a file
  export               for timm, transformers, torchvision, ONNX, torch.export
  visualize            attention, patches, reconstructions, films
  report               one HTML file about a run, or about several
  doctor               examines images and settings before a run
  configs [NAME]       lists the settings that come with the package; shows one

ssl-vit COMMAND --help explains a command, --help-all lists all of its flags.
--config takes a file or a name of `ssl-vit configs`, as --config quickstart_mae.
--num_processes N starts N processes of this machine (GPUs, or shares of the cores).
--completion bash|zsh|fish prints what completes these words in your shell.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0].partition("=")[0] == "--completion":
        return print_completion(words[0].partition("=")[2] or "".join(words[1:2]))
    if words[0] == "configs":
        return show_configs(words[1:])
    command = next((text for text in (" ".join(words[:2]), words[0]) if text in FRONTS), None)
    if command is None:
        return refuse(words)
    flags = words[len(command.split()) :]
    num_processes, flags = take_number(flags, "--num_processes")
    front = folder("scripts") / f"{FRONTS[command]}.py"
    if num_processes is None or num_processes == 1:
        sys.argv = [str(front), *flags]
        core_front.program = f"ssl-vit {command}"
        runpy.run_path(str(front), run_name="__main__")
        return 0
    if command not in PARALLEL:
        return fail(f"--num_processes={num_processes}: {command} runs in one process; leave the flag out")
    launch(front, flags, num_processes)


def launch(front: Path, flags: list[str], num_processes: int) -> NoReturn:
    """Become a launcher of processes: Accelerate's on GPUs; torch's on CPUs, where Accelerate starts but one."""
    import torch

    if torch.cuda.is_available():
        starter = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={num_processes}"]
    else:
        starter = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *starter, str(front), *flags])


def take_number(words: list[str], flag: str) -> tuple[int | None, list[str]]:
    """Take `flag N` or `flag=N` out of a command line."""
    parser = FlagParser(add_help=False)
    parser.add_argument(flag, type=positive, default=None)
    found, rest = parser.parse_known_args(words)
    return getattr(found, flag.removeprefix("--")), rest


def positive(text: str) -> int:
    """A count of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number of at least 1")
    return int(text)


def refuse(words: list[str]) -> int:
    """Say in one line what is wrong with words that are no command."""
    kinds = [name.split()[1] for name in FRONTS if name.split()[0] == words[0]]
    if kinds:
        given = words[1] if len(words) > 1 else ""
        if given in ("-h", "--help"):
            print(f"usage: ssl-vit {words[0]} {'|'.join(kinds)} [FLAGS]")
            return 0
        found = f"no such kind of {words[0]}" if given else f"{words[0]} what"
        return fail(f"{' '.join(words[:2])}: {found}; one of {', '.join(kinds)}")
    names = sorted({name.split()[0] for name in FRONTS} | {"configs"})
    return fail(f"{words[0]}: no such command{nearest(words[0], names).replace('--help', 'ssl-vit --help')}")


def show_configs(words: list[str]) -> int:
    """List the configs with the first sentence of each header, or print one."""
    if words[:1] in (["-h"], ["--help"]):
        print("usage: ssl-vit configs [NAME]")
        return 0
    if len(words) > 1:
        return fail(f"configs {' '.join(words)}: takes one name")
    if words:
        try:
            print(find_config(words[0]).read_text(), end="")
        except (ValueError, OSError) as error:
            return fail(str(error).removeprefix("--config="))
        return 0
    listed = []
    for path in sorted(folder("configs").glob("*.yaml")):
        lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines()[:3]]
        sentence = " ".join(lines[: lines.index("")] if "" in lines else lines[:1])
        listed.append(f"{path.stem:40}{sentence}")
    print("\n".join(listed))
    return 0


def print_completion(shell: str) -> int:
    """Print a script that completes commands and flags in a shell, by shtab."""
    try:
        import shtab
    except ImportError:
        return fail("--completion: needs shtab; pip install 'ssl-vit[completion]'")
    if shell not in shtab.SUPPORTED_SHELLS:
        return fail(f"--completion={shell}: give one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    print(shtab.complete(completion_parser(), shell))
    return 0


def completion_parser() -> argparse.ArgumentParser:
    """A parser that knows the words of all commands and parses nothing."""
    flags = json.loads((folder("scripts") / "flags.json").read_text())
    parser = argparse.ArgumentParser("ssl-vit")
    commands = parser.add_subparsers()
    groups: dict[str, argparse._SubParsersAction] = {}
    for name, front in FRONTS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            groups[first] = commands.add_parser(first, help=first).add_subparsers()
        command = (groups[first] if second else commands).add_parser(second or first, help=name)
        more = ["--num_processes"] if name in PARALLEL else []
        for flag in [*flags[front], *more]:
            if flag not in ("-h", "--help"):
                command.add_argument(flag)
    names = [path.stem for path in folder("configs").glob("*.yaml")]
    commands.add_parser("configs", help="configs").add_argument("name", nargs="?", choices=sorted(names))
    return parser


def fail(message: str) -> int:
    """Print an error; returns its exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def entry() -> int:
    """`main` for the shell; a reader that has seen enough, as `| head`, ends it without an error."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(entry())
