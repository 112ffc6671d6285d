"""`ouro VERB --flag=value …`: finds the verb's module and runs it."""

import importlib
import sys

from ouro_jax.errors import nearest

VERBS = {
    "train": "run or continue a curriculum",
    "data": "prepare, inspect and verify data sets",
    "checkpoint": "list, verify and prune the checkpoints of a run",
    "generate": "text from a checkpoint, with the exit depth of every token",
    "chat": "a conversation in the terminal, coloured by exit depth",
    "serve": "OpenAI's API over HTTP, and a page to talk to the model",
    "eval": "benchmarks by depth: standard ones, those of the paper, and local ones",
    "convert": "Hugging Face checkpoints in and out",
    "plan": "compile for a pod that is not there: does it fit, what does it cost, what bounds it",
    "sweep": "many runs of one config: run or submit them, and compare what came of it",
    "experiment": "a controlled experiment of the paper: train its models, evaluate, draw",
    "report": "one page of pictures and tables from what a run wrote, or of all runs in a folder",
}


def main() -> None:
    """Entry point of the command `ouro`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("--help", "-h", "help"):
        print("usage: ouro VERB --flag=value …   (ouro VERB --help shows the flags)\n")
        for verb, does in VERBS.items():
            print(f"  {verb:10s} {does}")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    verb = sys.argv.pop(1)
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}.{nearest(verb, VERBS)}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"ouro_jax.cli.{verb}").run()


if __name__ == "__main__":
    main()
