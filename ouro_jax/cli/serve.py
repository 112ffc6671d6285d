"""Serves a checkpoint over HTTP: OpenAI's completions and chat, and a page in the browser.

  ouro serve --checkpoint=runs/tiny
  ouro serve --checkpoint=Ouro-1.4B-Thinking --kv=exited,full --exit=q:0.8 --slots=16 --window=8192
  OURO_API_KEY=… ouro serve --checkpoint=Ouro-1.4B --host=0.0.0.0 --port=80

--checkpoint takes a workdir, one of its stages, or a folder in the Hugging Face format. Requests
run together in --slots slots of --window positions for each KV policy; more wait, up to
--max_waiting, and beyond that are refused with 429. docs/serving.md has fields and errors.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags

from ouro_jax.cli.common import FLAGS, required, run_verb
from ouro_jax.errors import ConfigError, RunError

flags.DEFINE_string("checkpoint", "", "Workdir, stage folder or Hugging Face folder.")
flags.DEFINE_string("name", "", "What requests call the model; unset: the checkpoint's name.")
flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; the default is this machine only.")
flags.DEFINE_integer("port", 8000, "Port to listen at; 0: any free one.", 0, 65535)
flags.DEFINE_list("kv", ["exited"], "KV policies, e.g. exited,full; the first is the default.")
flags.DEFINE_integer("slots", 8, "Answers at once, for each KV policy.", 1)
flags.DEFINE_integer("window", None, "Positions of a slot; unset: the model's, at most 4096.", 2)
flags.DEFINE_integer("loops", None, "Most loops a request may run; unset: as trained.", 1)
flags.DEFINE_string("exit", None, "Exit rule of requests that name none; unset: all loops.")
flags.DEFINE_string("api_key_file", None, "File with the key; unset: OURO_API_KEY, or no key.")
flags.DEFINE_integer("max_body_bytes", 4 << 20, "Larger bodies are refused with 413.", 1)
flags.DEFINE_integer("max_waiting", 64, "Answers that may wait for a slot; more: 429.", 0)
flags.DEFINE_float("timeout_seconds", 600.0, "Longer answers are ended with an error.", 0.001)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# What a slot holds if nobody says: the windows of released models fill a chip's memory.
DEFAULT_WINDOW = 4096
BACKLOG = 2048
LONG_PROMPT = 960  # one piece each of 512, 256, 128 and 64 tokens


def main() -> None:
    """The verb; returns when the server was asked to stop."""
    path = required("checkpoint", "runs/tiny")
    key = _api_key()
    if FLAGS.host not in LOOPBACK and not key:
        print(
            f"warning: --host={FLAGS.host} lets other machines in and there is no key: set "
            "OURO_API_KEY or --api_key_file.", file=sys.stderr,
        )  # fmt: skip
    listener = _bind(FLAGS.host, FLAGS.port)
    # Loading jax and the model takes seconds; a wrong flag should not wait for them.
    try:
        import uvicorn

        from ouro_jax.inference.server.app import Limits, make_app
    except ImportError as error:
        raise ConfigError(f"{error}: serving takes pip install -e '.[serve]'.") from error
    limits = Limits(FLAGS.max_body_bytes, FLAGS.max_waiting, FLAGS.timeout_seconds, key)
    served = _load(path)
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        # An engine that broke stays broken: the process ends, for its supervisor to start anew.
        traceback.print_exception(error)
        failures.append(error)
        server.should_exit = True

    app = make_app(served, limits, failed)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10, access_log=False)
    )
    # From here on connections wait instead of being refused: what is printed is true at once.
    listener.listen(BACKLOG)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {served.name} at http://{shown}:{port} (page at /, API at /v1)", flush=True)
    # uvicorn raises the signal that stopped it once more; this one is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run([listener])
    if failures:
        raise RunError(f"the engine failed: {failures[0]}")


def _api_key() -> str:
    """The key of --api_key_file, or of the environment; empty: everyone may ask."""
    if FLAGS.api_key_file is None:
        return os.environ.get("OURO_API_KEY", "").strip()
    try:
        key = Path(FLAGS.api_key_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file={FLAGS.api_key_file}: {error}") from error
    if not key:
        raise ConfigError(f"--api_key_file={FLAGS.api_key_file} is empty: expected the key.")
    return key


def _bind(host: str, port: int) -> socket.socket:
    """A socket at the address, before minutes go into loading: one in use is found at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port}: cannot listen there ({error.strerror or error}); "
            "expected an address of this machine and a free port."
        ) from error
    return listener


def _load(path: str) -> Any:
    """The model with an engine for each KV policy, their programs compiled."""
    from ouro_jax.cli.open_checkpoint import open_checkpoint
    from ouro_jax.data.tokenizer import IM_END, IM_START, load_tokenizer
    from ouro_jax.inference.engine import Engine
    from ouro_jax.inference.requests import Request, beyond_training, check_request
    from ouro_jax.inference.server.protocol import Served
    from ouro_jax.inference.slots import decoding_params
    from ouro_jax.inference.text import stop_ids

    policies = [kv.strip() for kv in FLAGS.kv]
    if len(set(policies)) < len(policies) or not policies:
        raise ConfigError(f"--kv={','.join(policies)}: expected each KV policy once.")
    checkpoint = open_checkpoint(path)
    if checkpoint.tokenizer_file is None:
        raise ConfigError(f"--checkpoint={path}: there is no tokenizer.json beside it.")
    tokenizer = load_tokenizer(checkpoint.tokenizer_file)
    config = checkpoint.config
    window = FLAGS.window or min(DEFAULT_WINDOW, config.max_position_embeddings)
    if warning := beyond_training(config, FLAGS.loops or config.num_loops):
        print(warning, file=sys.stderr)
    params = decoding_params(config, checkpoint.params)  # once, and not for each engine
    engines = {}
    for kv in policies:
        engines[kv] = Engine(config, params, kv, FLAGS.slots, window, FLAGS.loops)
    probe = Request(prompt=(0,), max_new_tokens=1, exit=FLAGS.exit)
    for engine in engines.values():
        check_request(config, probe, engine.window, engine.loops)
    for kv, engine in engines.items():
        print(f"compiling for kv={kv} …", file=sys.stderr, flush=True)
        _warm_up(engine)
    can_chat = None not in (tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END))
    return Served(
        FLAGS.name or checkpoint.name, tokenizer, engines, FLAGS.exit,
        frozenset(stop_ids(tokenizer, None)), can_chat,
    )  # fmt: skip


def _warm_up(engine: Any) -> None:
    """Fills all slots, one after another, so that no client waits for a compiler.

    The first prompt is long enough to be read in pieces of every size.
    """
    from ouro_jax.inference.requests import Request

    tokens = min(engine.num_slots + LONG_PROMPT // 64, engine.window - 1)
    long = max(1, min(LONG_PROMPT, engine.window - tokens))
    for length in (long, *[1] * (engine.num_slots - 1)):
        engine.submit(Request(prompt=(0,) * length, max_new_tokens=tokens))
    while not engine.idle:
        engine.step()


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
