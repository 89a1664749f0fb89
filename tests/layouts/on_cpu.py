"""`finetune.py` under a file of configs/accelerate, on CPU processes: the same settings, another device.

accelerate by itself does without FSDP and DeepSpeed on CPUs, and says nothing.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ROOT = Path(__file__).parent.parent.parent


def environment(config: Path) -> dict[str, str]:
    """What `accelerate launch` would set for its processes."""
    args = launch_command_parser().parse_args(["--config_file", str(config), "finetune.py"])
    args, defaults, _ = _validate_launch_command(args)
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


def command(processes: int, *flags: Any, **options: Any) -> list[str]:
    """torchrun's; `options` are its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
    torchrun += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()] or ["--standalone"]
    return [str(x) for x in (*torchrun, "-m", "tests.layouts.on_cpu", *flags)]


def settings(config: Path, **more: str) -> dict[str, str]:
    """The environment of the processes; Triton's interpreter is for the tests of our kernels alone."""
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "TRITON_INTERPRET": "0"}
    return {**environment(config), **own, **more}


def launch(config: Path, processes: int, *flags: Any, **more: str) -> subprocess.CompletedProcess[str]:
    """`processes` times finetune.py with these flags, and `more` in their environment."""
    return subprocess.run(
        command(processes, *flags), env=settings(config, **more), cwd=ROOT, capture_output=True, text=True
    )


def shard_with(plugin: FullyShardedDataParallelPlugin) -> None:
    """Tell accelerate that these processes are what it shards over."""
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    PartialState._shared_state.update(distributed_type=DistributedType.FSDP)


def allow_fsdp_on_the_cpu() -> None:
    """Whenever accelerate looks what it runs on."""
    init = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        shard_with(FullyShardedDataParallelPlugin())

    AcceleratorState.__init__ = patched  # type: ignore[method-assign]


def use_gloo() -> None:
    """Not DeepSpeed's own sums in shared memory, which a process that is killed leaves behind half done."""
    backend = import_module("deepspeed.comm.torch")  # as an attribute, `deepspeed.comm.torch` is torch itself
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def kill_once(process: str, where: str) -> None:
    """The process with this rank dies in its third step, or while it saves its second checkpoint."""
    if os.environ["RANK"] != process or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    from to_finetune.training import sft, trainer

    calls = 0
    owner, name, last = {
        "step": (sft.TOSFTTrainer, "training_step", 3),
        "save": (trainer, "save_state", 2),
    }[where]
    function = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, patched)


def main(argv: list[str]) -> int:
    """One launch for several runs: the flags of each beside those of all, as JSON in the environment's RUNS.

    With SAVE_WHOLE there, they save as a user's own Trainer does.
    """
    from to_finetune.finetune import main as finetune
    from to_finetune.training import FinetuneArguments, traces

    traces.NEW_TOKENS = 8  # as in `helpers.finetune`
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_the_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_gloo()
    if "KILL" in os.environ:
        kill_once(*os.environ["KILL"].split())
    if "SAVE_WHOLE" in os.environ:
        FinetuneArguments.save_only_trained = False
    gc.freeze()  # DeepSpeed collects garbage at every turn, which takes half a second with all that is imported
    codes = []
    for flags in json.loads(os.environ.get("RUNS", "[[]]")):
        codes.append(finetune([*argv, *flags]))
        AcceleratorState._reset_state()
    return max(codes)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Gloo's threads at times abort a process that ends in the ordinary way
