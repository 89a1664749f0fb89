"""`finetune.py` under a file of configs/accelerate, on CPU processes: the same settings, another device.

accelerate by itself does without FSDP and DeepSpeed on CPUs, and says nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
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


def launch(config: Path, processes: int, *flags: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    """`processes` times finetune.py with these flags."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    torchrun += [f"--{key.replace('_', '-')}={value}" for key, value in more.items()]
    command = [*torchrun, "-m", "tests.layouts.on_cpu", *flags]
    settings = {**environment(config), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([str(x) for x in command], env=settings, cwd=ROOT, capture_output=True, text=True)


def allow_fsdp_on_the_cpu() -> None:
    """Tell accelerate that these processes are what it shards over."""
    init = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = FullyShardedDataParallelPlugin()
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)

    AcceleratorState.__init__ = patched  # type: ignore[method-assign]


if __name__ == "__main__":
    from to_finetune.finetune import main

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_the_cpu()
    sys.exit(main())
