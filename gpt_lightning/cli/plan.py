"""``plan``: the memory, disk and time that ``fit`` needs with the same settings."""

import json
import math
from dataclasses import asdict, replace
from functools import cached_property

import psutil
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from gpt_lightning.cli.plan_text import describe_schedule, print_plan
from gpt_lightning.cli.training_cli import TrainingCLI
from gpt_lightning.data.corpus import VERDICT
from gpt_lightning.data.dataset import window_count
from gpt_lightning.data.epochs import EpochShape, batches_of_epoch, global_batch, window_length
from gpt_lightning.data.token_cache import count_training_tokens, find_tokenizer
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.kernels.support import kernels_unsupported_reason
from gpt_lightning.model.config import GPT2_SIZES, GPTConfig
from gpt_lightning.model.hardware import MEMORY, OLDER_THAN_AMPERE, PEAKS
from gpt_lightning.model.precision import PRECISIONS, SHARDED_PRECISIONS
from gpt_lightning.planning.plan import RunSpec, Strategy, plan
from gpt_lightning.planning.step_parts import DeviceType, StepShape
from gpt_lightning.pretrained.source import size_to_download
from gpt_lightning.storage.cache import cache_folder
from gpt_lightning.suggestions import suggest
from gpt_lightning.training.build import build_modules
from gpt_lightning.training.checkpoint_callback import kept_steps
from gpt_lightning.training.hardware import peak_flops
from gpt_lightning.training.module import GPTLightningModule, reconcile_config
from gpt_lightning.training.schedule import Schedule
from gpt_lightning.training.start import Start, find_start, was_started

# what fit's process needs beyond plan's: tokenizer, TensorBoard, matplotlib, threads
IMPORTED_LATER = 120_000_000

_PRECISION_NAMES = {
    None: "32-true",
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "64": "64-true",
}


def run(arguments: list[str]) -> None:
    """Estimate what a run takes, from the settings of fit. Nothing is trained and nothing is written.

    The output has parameters, FLOPs per token, the peak memory of one device part by part, KV cache, checkpoints
    on disk, optimizer steps and hours. If the run does not fit, it has the fewest settings to change so that it
    does. Memory is computed by a formula from shapes, strategy, precision and kernels.
    """
    cli = PlanCLI(arguments)
    config = cli.config
    for name in ("devices", "train_tokens", "peak_tflops", "device_memory_gb"):
        if config[name] is not None and not 0 < config[name] < math.inf:
            raise ValueError(f"{name}: {config[name]} is out of range; give more than 0")
    if not 0.0 < config.mfu <= 1.0:
        raise ValueError(f"mfu: {config.mfu} is not a share of the peak; give e.g. 0.4")
    spec = cli.spec()
    peak, device_memory = cli.peak(spec), cli.device_memory(spec)
    epoch = cli.epoch(spec)
    tokens, steps = cli.length(spec, epoch)
    spec = replace(spec, kept_steps=cli.kept_steps(steps))
    result = plan(
        spec,
        tokens=tokens,
        steps=steps,
        epoch=epoch,
        peak_flops=peak,
        mfu=config.mfu,
        device_memory=device_memory,
    )
    cli.note_what_is_not_counted()
    schedule = cli.schedule(steps, epoch)
    if config.json:
        print(
            json.dumps(
                {
                    **asdict(result),
                    "schedule": asdict(schedule),
                    "settings": asdict(spec),
                    "notes": cli.notes,
                }
            )
        )
    else:
        print_plan(result, spec, {**describe_schedule(schedule, cli.clip_norm), **cli.notes})


class PlanCLI(TrainingCLI):
    """Settings as ``fit`` parses them, but without a trainer: its devices may be on another machine.

    Attributes:
        notes: What the numbers leave out, one line per topic.
    """

    notes: dict[str, str]
    _module: GPTLightningModule

    def __init__(self, arguments: list[str]) -> None:
        self.notes = {}
        super().__init__("plan", arguments, run.__doc__)

    @property
    def architecture(self) -> GPTConfig:
        return self.start.architecture

    @cached_property
    def start(self) -> Start:
        """The start of the run; GPT-2's architecture is known before it is downloaded."""
        config = self.run_config()
        try:
            find_tokenizer(None, config.texts)
        except (ValueError, OSError) as error:  # a store that cannot be read: fit refuses it
            self.notes["text"] = " ".join(str(error).split())
            config.data = {**config.data, "text": "sample", "mixture": None}
        resumes = config.ckpt_path and (config.ckpt_path != "auto" or was_started(config.folder))
        size = None if resumes else size_to_download(config.init_from or "")
        if size is None:
            return find_start(config)
        architecture = reconcile_config(
            f"init_from: {config.init_from}", GPT2_SIZES[size], config.given_architecture
        )
        tokenizer = find_tokenizer(self.config.data.tokenizer, config.texts, GPT2)
        return Start(architecture=architecture, tokenizer=tokenizer)

    def spec(self) -> RunSpec:
        config, trainer, data = self.config, self.config.trainer, self.config.data
        devices = self._devices()
        precision = str(trainer.precision) if trainer.precision is not None else None
        precision = _PRECISION_NAMES.get(precision, precision)
        if precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision: plan does not know {precision}; {suggest(precision or '', PRECISIONS)}"
            )
        strategy, bucket_view = self._strategy(devices, precision)
        architecture = self.architecture
        self._module, _ = build_modules(
            self.run_config(), architecture, self.start.tokenizer
        )  # they check their settings
        if strategy == "fsdp":
            self._module.optimizer_config.check_sharding()
        length = window_length(data.context_length, architecture.context_length)
        step = StepShape(
            config=architecture,
            batch_size=data.batch_size,
            length=length,
            precision=precision,
            loss_chunk_size=config.model.loss_chunk_size,
            activation_checkpointing=config.model.activation_checkpointing,
            device=self._device(),
            loss_kernel=self._runs_our_kernels(),
            state_values=self._module.optimizer_config.state_values(architecture),
            muon=config.model.optimizer == "muon",
            fused=self._module.optimizer_config.is_fused,
            ema=config.model.ema_decay is not None,
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
            keep_freed_memory=config.keep_freed_memory is not False,
            base=psutil.Process().memory_info().rss + IMPORTED_LATER if step.device == "cpu" else 0,
            keep_best=saves and config.checkpoint.save_best,
            keep_previous=saves and config.checkpoint.keep_previous,
            async_save=saves and config.checkpoint.async_save,
            can_shard=self._module.optimizer_config.can_shard,
        )

    def note_what_is_not_counted(self) -> None:
        if self.config.data.document_mask:
            self.notes["document_mask"] = (
                "not counted: attention's masks, and its kernels that keep more than the fast ones"
            )
        if self.config.model.compile:
            self.notes["compile"] = (
                "not counted: compiled blocks keep less for the backward pass than this"
            )

        if self._lacks_bfloat16(str(self.config.trainer.precision)):
            self.notes["precision"] = (
                f"{self.config.gpu} has no bfloat16, which is slow there, and attention's matrices are not counted; "
                "give --trainer.precision 16-mixed"
            )

    def _lacks_bfloat16(self, precision: str) -> bool:
        return "bf16" in precision and self.config.gpu in OLDER_THAN_AMPERE

    def _device(self) -> DeviceType:
        if self.config.gpu is not None and self.config.gpu not in MEMORY:
            raise ValueError(
                f"gpu: {self.config.gpu} is not in plan's table; {suggest(self.config.gpu, MEMORY)} "
                "(or --device_memory_gb and --peak_tflops, with --trainer.accelerator gpu)"
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
        """Whether the named GPU, else this machine's, runs our kernels; an unknown GPU counts as one that does."""
        if self.config.gpu is not None or not torch.cuda.is_available():
            return self.config.gpu not in OLDER_THAN_AMPERE
        return kernels_unsupported_reason(torch.device("cuda")) is None

    def _devices(self) -> int:
        if self.config.devices is not None:
            return int(self.config.devices)
        trainer = self.config.trainer
        devices = trainer.devices
        if isinstance(devices, list):
            count = len(devices)
        elif devices in (None, "auto", -1, "-1"):
            count = max(1, torch.cuda.device_count()) if self._device() == "cuda" else 1
        else:
            try:
                count = int(devices)
            except ValueError:
                count = len(str(devices).strip(",").split(","))
        return max(1, count) * int(trainer.num_nodes or 1)

    def _strategy(self, devices: int, precision: str) -> tuple[Strategy, bool]:
        """The strategy, and whether DDP's gradients are views of its buckets."""
        strategy = self.config_init.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            if precision not in SHARDED_PRECISIONS:  # what fit's trainer says
                raise ValueError(
                    "trainer: The `ModelParallelStrategy` does not support "
                    f"`Fabric(..., precision={precision!r})`. Choose a different precision among: "
                    f"{', '.join(SHARDED_PRECISIONS)}."
                )
            return ("fsdp" if devices > 1 else "single"), False
        if isinstance(strategy, DDPStrategy):
            return "ddp", bool(strategy._ddp_kwargs.get("gradient_as_bucket_view"))
        if strategy in (None, "auto") or isinstance(strategy, SingleDeviceStrategy):
            return ("ddp" if devices > 1 else "single"), False
        if isinstance(strategy, str) and strategy.startswith("ddp"):
            return "ddp", False
        raise ValueError(
            f"trainer.strategy: plan does not know {strategy}; it knows auto, ddp, and FSDP2 as a class "
            "(--config configs/fsdp.yaml)"
        )

    def _micro_batches(self, batch_size: int, length: int, devices: int) -> tuple[int, bool]:
        """Micro-batches of a step on each device, and whether they follow from a global batch."""
        data = self.config.data
        given = int(self.config.trainer.accumulate_grad_batches or 1)
        if data.global_batch_size is None and data.global_batch_tokens is None:
            return given, False
        windows = self._train_windows
        step = global_batch(
            data.global_batch_size, data.global_batch_tokens, length, batch_size * devices, windows
        )
        assert step is not None
        return step.micro_batches(batch_size, devices, given, windows), True

    def length(self, spec: RunSpec, epoch: EpochShape | None) -> tuple[int | None, int | None]:
        """Tokens and optimizer steps of the run, as ``fit`` counts them; ``None``: not known."""
        config, trainer = self.config, self.config.trainer
        max_steps = -1 if trainer.max_steps is None else int(trainer.max_steps)
        max_epochs, max_tokens = trainer.max_epochs, config.get("max_tokens")
        if config.train_tokens is not None:
            max_steps, max_epochs, max_tokens = -1, None, int(config.train_tokens)
        elif max_epochs is None and max_steps == -1 and not (max_tokens or trainer.max_time):
            max_epochs = 1000  # Lightning's default
        if epoch is None:
            epoch, max_epochs = spec.epoch(None), None
        steps = epoch.steps_of_run(max_steps, max_epochs, max_tokens)
        if steps is None:
            return None, None
        if config.train_tokens is not None:
            return int(config.train_tokens), steps
        return epoch.tokens_after(steps), steps

    def kept_steps(self, steps: int | None) -> int:
        """Checkpoints that the run keeps at intervals."""
        if self.config.trainer.enable_checkpointing is False:
            return 0
        kept = self.config.checkpoint
        if steps is None and kept.keep_every_n_train_steps and kept.max_to_keep is None:
            self.notes["disk"] = (
                "not counted: what checkpoint.keep_every_n_train_steps keeps; the length of the run is not known"
            )
            return 0
        return kept_steps(steps, kept.keep_every_n_train_steps, kept.max_to_keep)

    def schedule(self, steps: int | None, epoch: EpochShape | None) -> Schedule:
        """Learning rate and clipping of the run; with shares of the run if its length is not known."""
        schedule = self._module.schedule
        if steps is None and epoch is None:
            return schedule
        if self.config.train_tokens is None:
            schedule.check_clipping(steps)
        return schedule.resolve(steps)

    @property
    def clip_norm(self) -> float | None:
        return self.config.trainer.gradient_clip_val or None

    def epoch(self, spec: RunSpec) -> EpochShape | None:
        """An epoch of the run; ``None``: its text is not here."""
        windows, trainer = self._train_windows, self.config.trainer
        if windows is None:
            return None
        batches = batches_of_epoch(
            windows,
            spec.windows_per_batch,
            accumulate=spec.micro_batches,
            whole_steps=spec.global_batch_is_given,
            limit=trainer.overfit_batches or trainer.limit_train_batches,
        )
        if not batches:
            self.notes["text"] = (
                f"has {windows} training windows, fewer than a batch of {spec.windows_per_batch}; fit refuses it "
                "and needs more text"
            )
            return None
        return spec.epoch(batches)

    @cached_property
    def _train_windows(self) -> int | None:
        """Training windows; ``None``: the text is not here, or cannot be read."""
        data = self.config.data
        length = window_length(data.context_length, self.architecture.context_length)
        texts = list(data.mixture) if data.mixture else [data.text]
        if "verdict" in texts and not (cache_folder() / VERDICT).exists():
            return None
        try:
            counts = [
                count_training_tokens(text, data.train_ratio, self.start.tokenizer)
                for text in texts
            ]
        except (ValueError, OSError) as error:
            self.notes["text"] = " ".join(str(error).split())
            return None
        return sum(window_count(tokens, length, data.stride or length) for tokens in counts)

    def peak(self, spec: RunSpec) -> float | None:
        """Peak FLOP/s of one device: the given one, the named GPU's or this machine's; ``None``: not known."""
        if self.config.peak_tflops is not None:
            return float(self.config.peak_tflops) * 1e12
        precision = spec.step.precision
        if self.config.gpu is not None:
            known = "16" in precision and not self._lacks_bfloat16(precision)
            return PEAKS[self.config.gpu] if known else None
        if spec.step.device == "cuda" and not torch.cuda.is_available():
            return None
        peak = peak_flops(torch.device(spec.step.device), precision)
        if peak is not None and spec.step.device == "cpu":
            return peak / spec.devices  # its processes share the cores
        return peak

    def device_memory(self, spec: RunSpec) -> int | None:
        """Bytes of one device: the given ones, the named GPU's or this machine's; ``None``: not known."""
        if self.config.device_memory_gb is not None:
            return int(self.config.device_memory_gb * 1e9)
        if self.config.gpu is not None:
            return int(MEMORY[self.config.gpu])
        if spec.step.device == "cpu":
            return int(psutil.virtual_memory().total) // spec.devices
        if torch.cuda.is_available():
            return int(torch.cuda.mem_get_info()[1])
        return None
