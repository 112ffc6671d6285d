"""The processes of a run: they find each other, wait for each other, agree, and stop together.

`ouro train` joins the processes that one of these describes:
  flags             `--coordinator=HOST:PORT --num_processes=N --process_id=I`, HOST being where
                    process 0 runs and PORT any free one there
  SLURM             `srun` with more than one task; each takes the GPU of its SLURM_LOCALID, or
                    those of JAX_LOCAL_DEVICE_IDS
  Cloud TPU, GKE    every worker of a TPU slice, or of several slices
and is alone elsewhere, or with `--distributed=off`.

No process waits for another without end. One that fails says so to the others, which stop within
`POLL_SECONDS` with its message and its exit code; one that dies or hangs without a word is missed
after `HEARTBEAT_SECONDS`; waiting has a limit at every barrier, and at the start `JOIN_SECONDS`.

`jax.distributed` offers no barrier, store or client in public. Its private ones are used here and
nowhere else, because what is public (`multihost_utils`) is a collective: it cannot time out.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import cloud_tpu_init
from jax._src.distributed import global_state
from jax.errors import JaxRuntimeError

from ouro_jax.errors import STUCK_CODE, ConfigError, RunError, Stopped

JOIN_SECONDS = 300  # the hosts of a pod come up minutes apart
HEARTBEAT_SECONDS = 45
POLL_SECONDS = 1.0
BARRIER_SECONDS = 600.0
SHARED_SECONDS = 30.0  # NFS may show a new file that late
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
STOPPED = "ouro/stopped"
AGAIN = "Run the same command again on all of them: the run goes on from its newest checkpoint."

_code_of_abort = 1
_uses: Counter[str] = Counter()  # how often a name has been waited at: the store's are used once


@contextlib.contextmanager
def joined(
    coordinator: str = "", num_processes: int = 0, process_id: int = 0, *, detect: bool = True,
    join_seconds: float = JOIN_SECONDS,
) -> Iterator[None]:  # fmt: skip
    """Inside, this process is one of the run's; what is raised inside stops all of them.

    With a `coordinator` these are the processes; else, if `detect`, those of the environment; else
    this one. Among others, what is raised ends this process here, with the exit code of the
    command line: jax's own clean-up would first wait for processes that are in no state to come.
    """
    method = _environment() if detect else None
    if coordinator:
        where: dict[str, Any] = {
            "coordinator_address": coordinator, "num_processes": num_processes,
            "process_id": process_id, "cluster_detection_method": "deactivate",
        }  # fmt: skip
    elif method:
        where = {"cluster_detection_method": method}
    else:
        yield
        return
    _join(where, join_seconds)
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        _stop_all(error, done)  # does not return: it says what was raised, and ends the process
    # A thread inside the client while Python ends would abort the process.
    done.set()
    watcher.join()


def barrier(name: str, timeout: float = BARRIER_SECONDS) -> None:
    """Returns when every process has called this; at once in a run of one process.

    Raises RunError after `timeout` seconds.
    """
    client: Any = global_state.client
    if client is None:
        return
    try:
        client.wait_at_barrier(_once(name), int(1000 * timeout))
    except JaxRuntimeError as error:
        raise _timed_out(name, timeout, error) from error


def from_first(name: str, value: Any, timeout: float = BARRIER_SECONDS) -> Any:
    """Process 0's `value` (what JSON can hold) on every process; `value` itself in a run of one.

    Raises RunError where process 0 has not called this within `timeout` seconds.
    """
    client: Any = global_state.client
    if client is None:
        return value
    key = _once(name)
    if global_state.process_id == 0:
        client.key_value_set(key, json.dumps(value))
        return value
    try:
        return json.loads(client.blocking_key_value_get(key, int(1000 * timeout)))
    except JaxRuntimeError as error:
        raise _timed_out(name, timeout, error) from error


def from_all(name: str, value: Any, timeout: float = BARRIER_SECONDS) -> list[Any]:
    """Every process's `value` (what JSON can hold) on every process, in the order of processes.

    Raises RunError where one has not called this within `timeout` seconds.
    """
    client: Any = global_state.client
    if client is None:
        return [value]
    key = _once(name)
    client.key_value_set(f"{key}/{global_state.process_id:06}", json.dumps(value))
    barrier(f"{name}, from all", timeout)
    return [json.loads(text) for _, text in sorted(client.key_value_dir_get(key))]


def require_same(name: str, value: Mapping[str, Any]) -> None:
    """Returns once every process has given the same `value`; nested mappings that JSON can hold.

    Raises ConfigError on a process that differs from process 0, naming every key that does.
    """
    ours = json.loads(json.dumps(value))
    differing = list(_differences(from_first(name, ours), ours, ""))
    if differing:
        here = global_state.process_id
        raise ConfigError(
            f"The processes of this run differ in their {name}; start them all with the same:\n"
            + "\n".join(
                f"  {key}: {first} on process 0, {other} on process {here}"
                for key, first, other in differing
            )
        )
    barrier(f"the same {name}")


def require_shared(folder: Path) -> None:
    """Makes `folder`, and returns once every process sees in it what process 0 writes there.

    Raises ConfigError on a process that does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if global_state.client is None:
        return
    file = folder / from_first("sign in the folder", f".seen-{secrets.token_hex(8)}")
    is_first = global_state.process_id == 0
    if is_first:
        file.touch()
    barrier("sign written")
    limit = time.monotonic() + SHARED_SECONDS
    while not file.exists():
        if time.monotonic() > limit:
            raise ConfigError(
                f"{folder}: {_me()}, on {socket.gethostname()}, does not see what process 0 wrote "
                "there; name a folder that all hosts share."
            )
        time.sleep(POLL_SECONDS)
    barrier("sign seen")
    if is_first:
        file.unlink()


def _differences(first: Any, ours: Any, key: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(first, dict) and isinstance(ours, dict):
        for name in sorted(first.keys() | ours.keys()):
            path = f"{key}.{name}" if key else name
            yield from _differences(first.get(name), ours.get(name), path)
    elif first != ours:
        yield key, json.dumps(first), json.dumps(ours)


def _environment() -> str | None:
    """What jax is to ask for the other processes; None where there are none."""
    if all(name in os.environ for name in SLURM) and int(os.environ["SLURM_NTASKS"]) > 1:
        return "slurm"
    if cloud_tpu_init.running_in_cloud_tpu_vm:
        workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
        return "gketpu" if workers else "gcetpu"
    return None


def _join(where: Mapping[str, Any], seconds: float) -> None:
    # The client's own limit aborts the process without saying whom it waited for.
    limit = threading.Timer(seconds, _leave_unjoined, (seconds,))
    limit.start()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=60,
        )  # fmt: skip
    except (JaxRuntimeError, ValueError) as error:
        raise RunError(
            f"{_me()} cannot join the run at {global_state.coordinator_address}: {error}. On "
            "process 0 the port must be free; elsewhere it must be process 0's address."
        ) from error
    finally:
        limit.cancel()
    # jax has caught SIGTERM, below Python, to ask for a save: then nothing but training could be
    # ended by it. Training catches it itself; other notices of the platform still come by jax.
    signal.signal(signal.SIGTERM, handler)
    _speak_on_abort()


def _leave_unjoined(seconds: float) -> NoReturn:
    first = global_state.process_id == 0
    _leave(1, (
        f"error: {_me()} waited {seconds:g} s at {global_state.coordinator_address} for "
        + ("the others to join. " if first else "process 0. ")
        + "Look into the logs of those that are missing: are they all started, with the same "
        "address and number of processes, and can they reach it?"
    ))  # fmt: skip


def _speak_on_abort() -> None:
    """The client aborts the process when a heartbeat fails, after lines that name the process.

    It calls no Python before, so a signal handler adds what to do, and the exit code.
    """
    text = (
        f"error: {_me()} stops, because another one stopped answering or this one was cut off "
        f"from {global_state.coordinator_address}: the lines above name it. {AGAIN}\n"
    ).encode()

    def speak(_: int) -> None:
        faulthandler.dump_traceback(2)
        os.write(2, text)
        os._exit(_code_of_abort)

    global _handler  # ctypes frees it otherwise
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(speak)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


def _watch(done: threading.Event) -> None:
    """Ends this process when another one says that it failed."""
    client: Any = global_state.client
    while not done.wait(POLL_SECONDS):
        try:
            notices = client.key_value_dir_get(STOPPED)
        except JaxRuntimeError:
            return  # process 0 is gone: the client is about to abort
        if notices and not done.is_set():
            notice = json.loads(min(notices)[1])
            if notice["code"] == STUCK_CODE:  # perhaps it waited for this one: where is it?
                faulthandler.dump_traceback()
            _leave(notice["code"], f"error: {_me()} stops, because {notice['text']}")


def _stop_all(error: BaseException, done: threading.Event) -> NoReturn:
    """Tells the others, and leaves."""
    if isinstance(error, JaxRuntimeError):
        # Perhaps a collective, broken because another process failed: let that one be heard. The
        # client may abort meanwhile, so what this one did is said first.
        traceback.print_exception(error)
        time.sleep(2 * POLL_SECONDS)
    done.set()
    if isinstance(error, Stopped):  # all of them do, after the same step
        # Process 0 takes the service with it, and a client that misses that aborts.
        global _code_of_abort
        _code_of_abort = error.exit_code
        with contextlib.suppress(RunError):
            barrier("stopped", timeout=60)
        if global_state.process_id == 0:
            time.sleep(2 * POLL_SECONDS)
        _leave(error.exit_code, f"error: {error}")
    code = 1
    if isinstance(error, ConfigError | RunError):
        code, text = error.exit_code, f"error: {error}"
    elif isinstance(error, JaxRuntimeError):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted"
    else:
        text = "".join(traceback.format_exception(error)).strip()
    _tell_all(code, "failed", text)
    if isinstance(error, JaxRuntimeError):
        text += (
            f"\nerror: {_me()} stops. If the lines above tell of a connection or a time limit, "
            f"another process died: its log says of what. {AGAIN}"
        )
    _leave(code, text)


def stop_all(code: int, text: str) -> NoReturn:
    """Ends this process at once, from any thread, and makes the others end with its `code` too."""
    if global_state.client is not None:
        _tell_all(code, "stops", text)
    _leave(code, text)


def _tell_all(code: int, deed: str, text: str) -> None:
    client: Any = global_state.client
    said = f"{_me()} {deed}: {text.removeprefix('error: ')}"
    notice = json.dumps({"code": code, "text": said})
    with contextlib.suppress(JaxRuntimeError):  # nobody hears where process 0 is gone
        client.key_value_set(f"{STOPPED}/{global_state.process_id}", notice)
        if global_state.process_id == 0:  # the store ends with this process
            time.sleep(2 * POLL_SECONDS)


def _leave(code: int, text: str) -> NoReturn:
    """Ends the process without clean-up, which would wait for the others."""
    if sys.stdout.isatty():
        print("\x1b[?25h", end="")  # the cursor, which a progress panel hides
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
    os._exit(code)


def _me() -> str:
    return f"process {global_state.process_id} of {global_state.num_processes}"


def _once(name: str) -> str:
    _uses[name] += 1
    return f"ouro/{name}/{_uses[name]}"


def _timed_out(name: str, timeout: float, error: Exception) -> RunError:
    return RunError(
        f"{_me()} waited up to {timeout:g} s at the barrier {name!r} for the others: "
        f"{str(error).splitlines()[0]} Look into the logs of those that did not come. {AGAIN}"
    )
