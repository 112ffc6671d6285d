"""Which benchmarks there are, and what lm-evaluation-harness makes of one, as records.

Importing this needs the extra `eval`, as `experiments.harness` does, which says so.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ouro_jax.errors import ConfigError, nearest, require
from ouro_jax.experiments.harness import HarnessLM
from ouro_jax.experiments.local_suite import local_tasks

Record = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A task, group or tag of the harness, or one of ours, and how it is asked.

    `num_fewshot` None leaves it to the task. `metric` is the one that counts, in the harness's
    words with its filter if there is one; None: all of them. `config` defines a task of ours.
    """

    task: str
    num_fewshot: int | None = None
    metric: str | None = None
    config: Mapping[str, Any] | None = None


# Table 16 where it names lm-evaluation-harness. MATH500 ran in a harness of the authors' own, and
# HumanEval and MBPP in evalplus, which runs what the model wrote. Which accuracy is meant is said
# nowhere: normalised by length for ARC and HellaSwag, as leaderboards have it.
_TABLE_16 = (
    Benchmark("mmlu", 5, "acc"),
    Benchmark("mmlu_pro", 5, "exact_match,custom-extract"),
    Benchmark("bbh_cot_fewshot", 3, "exact_match,get-answer"),
    Benchmark("arc_challenge", 25, "acc_norm"),
    Benchmark("hellaswag", 10, "acc_norm"),
    Benchmark("winogrande", 5, "acc"),
    Benchmark("gsm8k", 3, "exact_match,strict-match"),
)
_TABLES_10_AND_11 = (
    Benchmark("arc_challenge", 25, "acc_norm"),
    Benchmark("arc_easy", 8, "acc_norm"),
    Benchmark("commonsense_qa", 10, "acc"),
    Benchmark("hellaswag", 10, "acc_norm"),
    Benchmark("mmlu", 5, "acc"),
    Benchmark("winogrande", 5, "acc"),
)
PRESETS = {"paper": _TABLE_16, "paper_depth": _TABLES_10_AND_11}
LOCAL = "local"
SUITES = (*PRESETS, LOCAL)


def find_benchmarks(names: Sequence[str], num_fewshot: int | None = None) -> list[Benchmark]:
    """The benchmarks that names stand for: suites, tasks of the local one, the harness's tasks.

    Raises ConfigError for a name that nobody knows, naming the nearest one, and for a
    `num_fewshot` beside a preset, whose settings are its point. Names that are not ours are looked
    up in the harness, which takes half a minute to read its index.
    """
    local = {
        task["task"]: Benchmark(task["task"], num_fewshot, config=task) for task in local_tasks()
    }
    found: list[Benchmark] = []
    unknown: list[str] = []
    for name in names:
        if name in PRESETS:
            require(
                num_fewshot is None, "num_fewshot", num_fewshot,
                f"unset with --tasks={name}, which says how many; or name the tasks one by one",
            )  # fmt: skip
            found += PRESETS[name]
        elif name == LOCAL:
            found += local.values()
        elif name in local:
            found.append(local[name])
        else:
            found.append(Benchmark(name, num_fewshot))
            unknown.append(name)
    if unknown:
        known = [*SUITES, *local, *_manager().all_tasks]
        for name in unknown:
            if name not in known:
                raise ConfigError(
                    f"--tasks: unknown task {name!r}; expected one of {', '.join(SUITES)}, or a "
                    f"task, group or tag of lm-evaluation-harness.{nearest(name, known)}"
                )
    return found


def run_benchmark(lm: HarnessLM, benchmark: Benchmark, limit: int | None) -> list[Record]:
    """Runs one benchmark on at most `limit` examples of each of its tasks; a record per metric.

    A record has `kind`, `task`, `metric`, `value`, `stderr` (None if there is none), `n` (examples
    of all its tasks), `num_fewshot`, `loops`, `exit`, `kv` (`full` where nothing was generated) and
    `mean_depth` of the tokens that were read. ConfigError if its data cannot be loaded.
    """
    # Beyond the class of models, the harness takes seconds to load.
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate

    task, config = benchmark.task, benchmark.config
    lm.take_mean_depth()
    try:
        spec = task if config is None else ConfigurableTask(config=dict(config))
        results: Any = simple_evaluate(
            lm, tasks=[spec], num_fewshot=benchmark.num_fewshot, limit=limit, log_samples=False,
            task_manager=_manager(with_tasks=config is None),
        )  # fmt: skip
    except OSError as error:  # what datasets raises: not there, not reachable, not allowed
        raise ConfigError(
            f"--tasks: the data set of {task} could not be loaded: {error}. It is downloaded from "
            "the Hugging Face hub, or read from its cache (HF_HOME); --tasks=local needs neither."
        ) from error
    generated = any(
        config["output_type"] == "generate_until" for config in results["configs"].values()
    )
    setting = {
        "loops": lm.loops, "exit": lm.exit, "kv": lm.kv if generated else "full",
        "mean_depth": lm.take_mean_depth(),
    }  # fmt: skip
    return [record | setting for record in _records(benchmark, results)]


def _records(benchmark: Benchmark, results: Any) -> Iterator[Record]:
    """The metrics of a task or a group; of a tag, those of all its tasks."""
    every = results["results"]
    for name in [benchmark.task] if benchmark.task in every else every:
        # A group counts the examples of all tasks that were run, which are its own.
        tasks = [name] if name in results["n-samples"] else list(results["n-samples"])
        shots = {results["n-shot"][task] for task in tasks}
        common = {
            "n": sum(results["n-samples"][task]["effective"] for task in tasks),
            "num_fewshot": shots.pop() if len(shots) == 1 else None,
        }
        for key, value in every[name].items():
            metric = key.removesuffix(",none")
            if not isinstance(value, float) or "_stderr" in key:
                continue
            if benchmark.metric in (None, metric):
                stderr = every[name].get(key.replace(",", "_stderr,", 1))
                found = {"value": value, "stderr": stderr if isinstance(stderr, float) else None}
                yield {"kind": "eval", "task": name, "metric": metric} | found | common


@functools.cache
def _manager(with_tasks: bool = True) -> Any:
    """The harness's index of tasks, read once; empty for tasks of ours."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_tasks)
