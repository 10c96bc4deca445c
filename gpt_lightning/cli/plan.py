"""``plan``: what the run that ``fit`` would make of the same settings will take."""

import json
import math
from dataclasses import asdict
from typing import Any

import psutil
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from gpt_lightning.cli.plan_text import print_plan
from gpt_lightning.cli.suggestions import suggest
from gpt_lightning.cli.training_cli import TrainingCLI
from gpt_lightning.data.corpus import VERDICT
from gpt_lightning.data.datamodule import nearest_multiple
from gpt_lightning.data.dataset import window_count
from gpt_lightning.data.epochs import EpochShape, batches_of_epoch
from gpt_lightning.data.token_cache import count_training_tokens
from gpt_lightning.kernels.support import kernels_unsupported_reason
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.hardware import MEMORY, OLDER_THAN_AMPERE, PEAKS
from gpt_lightning.model.precision import PRECISIONS, SHARDED_PRECISIONS
from gpt_lightning.planning.memory import DeviceType, StepShape
from gpt_lightning.planning.plan import RunSpec, Strategy, plan
from gpt_lightning.pretrained.load import size_to_download
from gpt_lightning.storage.cache import cache_folder
from gpt_lightning.training.hardware import peak_flops
from gpt_lightning.training.module import reconcile_config

# what fit imports and keeps when it begins: tokenizer, TensorBoard, matplotlib, threads
LATER = 120_000_000

_OWN_NAMES = {
    None: "32-true",
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "64": "64-true",
}


def run(arguments: list[str]) -> None:
    """Count what a run will take, from the settings that fit takes; it trains nothing and writes nothing.

    Parameters, FLOPs a token, memory of one device at its peak part by part, KV cache, checkpoints on disk,
    updates and hours; where it does not fit, the fewest settings to change so that it does. Memory is counted
    by running a step on tensors without content, in the strategy, precision and kernels of the run.
    """
    cli = PlanCLI(arguments)
    config = cli.config
    for name in ("devices", "train_tokens", "peak_tflops", "device_memory_gb"):
        if config[name] is not None and not 0 < config[name] < math.inf:
            raise ValueError(f"{name}: {config[name]} is out of range; give more than 0")
    if not 0.0 < config.mfu <= 1.0:
        raise ValueError(f"mfu: {config.mfu} is no share of the peak; give e.g. 0.4")
    setting = cli.setting()
    peak, room = cli.peak(setting), cli.device_memory(setting)
    epoch = cli.epoch(setting)
    tokens, updates = cli.length(setting, epoch)
    found = plan(
        setting,
        tokens=tokens,
        updates=updates,
        epoch=epoch,
        peak_flops=peak,
        mfu=config.mfu,
        device_memory=room,
    )
    cli.note_what_is_not_counted(setting)
    if config.json:
        print(json.dumps({**asdict(found), "settings": asdict(setting), "notes": cli.notes}))
    else:
        print_plan(found, setting, cli.notes)


class PlanCLI(TrainingCLI):
    """Settings as ``fit`` parses them, with module and data, but no trainer: its devices may be elsewhere.

    Attributes:
        notes: A line each on what the figures do not say, by what it is about.
    """

    notes: dict[str, str]

    def __init__(self, arguments: list[str]) -> None:
        self.notes = {}
        super().__init__("plan", arguments, run.__doc__)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add = parser.add_argument
        add(
            "--devices",
            type=int | None,
            help="Over all machines; none: trainer.devices × num_nodes.",
        )
        add(
            "--gpu",
            type=str | None,
            help=f"A GPU, for its peak and its memory: {', '.join(MEMORY)}; none: the device that is here.",
        )
        add("--device_memory_gb", type=float | None, help="GB that one device has.")
        add("--peak_tflops", type=float | None, help="TFLOP/s of one device at most.")
        add("--mfu", type=float, default=0.4, help="Share of the peak that the run reaches.")
        add(
            "--train_tokens", type=int | None, help="To train on; none: as the trainer's steps say."
        )
        add("--json", action="store_true", help="Print one JSON object and nothing else.")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _adopt_architecture(self) -> None:
        config = self.config
        if config.ckpt_path == "auto":
            config.ckpt_path = "last" if self._was_started() else None
        size = size_to_download(config.init_from) if config.init_from else None
        if size is not None and not config.ckpt_path:  # known before it is downloaded
            linked = [f"--rng={config.rng}", f"--seed_everything={config.seed_everything}"]
            given = self.parser.parse_args(linked + self.arguments, defaults=False).as_dict()
            named = given.get("model", {}).get("config") or {}
            what = f"init_from: {config.init_from}"
            adopted = reconcile_config(what, GPT2_SIZES[size], named)
            config.model.config = Namespace(**asdict(adopted))
        else:
            super()._adopt_architecture()

    def setting(self) -> RunSpec:
        config, trainer, data = self.config, self.config.trainer, self.config.data
        devices = self._devices()
        precision = str(trainer.precision) if trainer.precision is not None else None
        precision = _OWN_NAMES.get(precision, precision)
        if precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision: plan does not know {precision}; {suggest(precision or '', PRECISIONS)}"
            )
        strategy, bucket_view = self._strategy(devices, precision)
        architecture = self.model.config
        length = data.context_length or architecture.context_length
        if length > architecture.context_length:
            raise ValueError(
                f"data.context_length: {length} is more than the model's "
                f"{architecture.context_length}; leave it out to take the model's"
            )
        step = StepShape(
            config=architecture,
            batch_size=data.batch_size,
            length=length,
            precision=precision,
            loss_chunk_size=config.model.loss_chunk_size,
            activation_checkpointing=config.model.activation_checkpointing,
            device=self._device(),
            loss_kernel=self._runs_our_kernels(),
        )
        micro_batches, is_given = self._micro_batches(data.batch_size, length, devices)
        saves = trainer.enable_checkpointing is not False
        return RunSpec(
            step,
            devices=devices,
            strategy=strategy,
            micro_batches=micro_batches,
            global_batch_is_given=is_given,
            bucket_view=bucket_view,
            base=psutil.Process().memory_info().rss + LATER if step.device == "cpu" else 0,
            keep_best=saves and config.checkpoint.save_best,
            keep_previous=saves and config.checkpoint.keep_previous,
            async_save=saves and config.checkpoint.async_save,
        )

    def note_what_is_not_counted(self, setting: RunSpec) -> None:
        if setting.step.device == "cpu" and self.config.keep_freed_memory:
            self.notes["freed memory"] = (
                "stays with the process, for up to 40% more than this; not with --keep_freed_memory false"
            )
        if self.config.data.document_mask:
            self.notes["document_mask"] = (
                "not counted: attention's masks, and its kernels that keep more than the fast ones"
            )
        if self.config.model.compile:
            self.notes["compile"] = (
                "not counted: compiled blocks keep less for the backward pass than this"
            )

    def _device(self) -> DeviceType:
        if self.config.gpu is not None and self.config.gpu not in MEMORY:
            raise ValueError(
                f"gpu: {self.config.gpu} is not in plan's table; {suggest(self.config.gpu, MEMORY)} "
                "Or give --device_memory_gb and --peak_tflops, with --trainer.accelerator gpu"
            )
        accelerator = self.config.trainer.accelerator
        if self.config.gpu is not None or accelerator in ("gpu", "cuda"):
            return "cuda"
        if accelerator in (None, "auto") and torch.cuda.is_available():
            return "cuda"
        if accelerator not in (None, "auto", "cpu"):
            raise ValueError(f"trainer.accelerator: plan knows cpu and gpu, not {accelerator}")
        return "cpu"

    def _runs_our_kernels(self) -> bool:
        """Of the GPU that is named, else of the one that is here; one that is neither counts as one that does."""
        if self.config.gpu is not None or not torch.cuda.is_available():
            return self.config.gpu not in OLDER_THAN_AMPERE
        return kernels_unsupported_reason(torch.device("cuda")) is None

    def _devices(self) -> int:
        if self.config.devices is not None:
            return int(self.config.devices)
        trainer = self.config.trainer
        asked = trainer.devices
        if isinstance(asked, list):
            here = len(asked)
        elif asked in (None, "auto", -1, "-1"):
            here = max(1, torch.cuda.device_count()) if self._device() == "cuda" else 1
        else:
            try:
                here = int(asked)
            except ValueError:
                here = len(str(asked).strip(",").split(","))
        return max(1, here) * int(trainer.num_nodes or 1)

    def _strategy(self, devices: int, precision: str) -> tuple[Strategy, bool]:
        """And whether DDP's gradients lie in its buckets."""
        asked = self.config_init.trainer.strategy
        if isinstance(asked, ModelParallelStrategy):
            if precision not in SHARDED_PRECISIONS:  # what fit's trainer says
                raise ValueError(
                    "trainer: The `ModelParallelStrategy` does not support "
                    f"`Fabric(..., precision={precision!r})`. Choose a different precision among: "
                    f"{', '.join(SHARDED_PRECISIONS)}."
                )
            return ("fsdp" if devices > 1 else "single"), False
        if isinstance(asked, DDPStrategy):
            return "ddp", bool(asked._ddp_kwargs.get("gradient_as_bucket_view"))
        if asked in (None, "auto") or isinstance(asked, SingleDeviceStrategy):
            return ("ddp" if devices > 1 else "single"), False
        if isinstance(asked, str) and asked.startswith("ddp"):
            return "ddp", False
        raise ValueError(
            f"trainer.strategy: plan does not know {asked}; it knows auto, ddp, and FSDP2 as a class "
            "(--config configs/fsdp.yaml)"
        )

    def _micro_batches(self, batch_size: int, length: int, devices: int) -> tuple[int, bool]:
        """Accumulated on each device, and whether that follows from a global batch."""
        data = self.config.data
        windows = data.get("global_batch_size")
        if tokens := data.get("global_batch_tokens"):
            if tokens % length:
                raise ValueError(
                    f"data.global_batch_tokens: {tokens} is no whole number of windows of {length}; give "
                    f"{nearest_multiple(tokens, length * batch_size * devices)}"
                )
            windows = tokens // length
        if not windows:
            return int(self.config.trainer.accumulate_grad_batches or 1), False
        if windows % (batch_size * devices):
            at_once = batch_size * devices
            raise ValueError(
                f"data.batch_size: {batch_size} windows on {devices} device(s) do not divide the global batch "
                f"of {windows}; give a data.batch_size that does, or a global batch of "
                f"{nearest_multiple(windows, at_once)} windows"
            )
        return windows // (batch_size * devices), True

    def length(self, setting: RunSpec, epoch: EpochShape | None) -> tuple[int | None, int | None]:
        """Tokens and updates of the run, as ``fit`` would count them; None: not known."""
        config, trainer = self.config, self.config.trainer
        max_steps = -1 if trainer.max_steps is None else int(trainer.max_steps)
        max_tokens = config.get("max_tokens")
        if config.train_tokens is not None:
            max_steps, max_epochs, max_tokens = -1, None, int(config.train_tokens)
        elif (
            trainer.max_epochs is None and max_steps == -1 and not (max_tokens or trainer.max_time)
        ):
            max_epochs = 1000  # Lightning's default
        else:
            max_epochs = trainer.max_epochs
        per_update = setting.tokens_per_update
        if epoch is None:
            limits = [max_steps] if max_steps >= 0 else []
            limits += [-(-max_tokens // per_update)] if max_tokens else []
        else:
            by_trainer = epoch.steps_of_run(max_steps, max_epochs)
            limits = [] if by_trainer is None else [by_trainer]
            limits += [epoch.steps_for(max_tokens)] if max_tokens else []
        if not limits:
            return None, None
        updates = min(limits)
        tokens = updates * per_update if epoch is None else epoch.tokens_after(updates)
        if config.train_tokens is not None:
            tokens = int(config.train_tokens)
        return tokens, updates

    def epoch(self, setting: RunSpec) -> EpochShape | None:
        """Of the run; None: its text is not here."""
        windows, trainer = self._windows(setting), self.config.trainer
        if windows is None:
            return None
        at_once = setting.step.batch_size * setting.devices
        batches = batches_of_epoch(
            windows,
            at_once,
            accumulate=setting.micro_batches,
            whole_steps=setting.global_batch_is_given,
            limit=trainer.overfit_batches or trainer.limit_train_batches,
        )
        if not batches:
            self.notes["text"] = (
                f"has {windows} training windows, not one batch of {at_once}; fit refuses it, and needs more text"
            )
            return None
        return EpochShape(batches, setting.micro_batches, at_once * setting.step.length)

    def _windows(self, setting: RunSpec) -> int | None:
        """For training, where the text is here and can be read."""
        data = self.config.data
        texts = list(data.mixture) if data.mixture else [data.text]
        if "verdict" in texts and not (cache_folder() / VERDICT).exists():
            return None
        length = setting.step.length
        try:
            counts = [count_training_tokens(text, data.train_ratio) for text in texts]
        except (ValueError, OSError) as error:
            self.notes["text"] = " ".join(str(error).split())
            return None
        return sum(window_count(tokens, length, data.stride or length) for tokens in counts)

    def peak(self, setting: RunSpec) -> float | None:
        """FLOP/s of one device: given, of the named GPU, or of what is here."""
        if self.config.peak_tflops is not None:
            return float(self.config.peak_tflops) * 1e12
        precision = setting.step.precision
        if self.config.gpu is not None:
            return PEAKS[self.config.gpu] if "16" in precision else None
        if setting.step.device == "cuda" and not torch.cuda.is_available():
            return None
        found = peak_flops(torch.device(setting.step.device), precision)
        if found is not None and setting.step.device == "cpu":
            return found / setting.devices  # its processes share the cores
        return found

    def device_memory(self, setting: RunSpec) -> int | None:
        """Of one device: given, of the named GPU, or of what is here."""
        if self.config.device_memory_gb is not None:
            return int(self.config.device_memory_gb * 1e9)
        if self.config.gpu is not None:
            return int(MEMORY[self.config.gpu])
        if setting.step.device == "cpu":
            return int(psutil.virtual_memory().total) // setting.devices
        if torch.cuda.is_available():
            return int(torch.cuda.mem_get_info()[1])
        return None
