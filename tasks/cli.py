"""The command line: LightningCLI, with one-line errors, run folders, and checkpoints that bring their settings along.

Precedence, lowest first: signatures, base.yaml, what a base brings along, the task's file, a checkpoint's own settings,
overlays, command line.
"""

import difflib
import importlib
import inspect
import json
import logging
import os
import re
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ctm.checkpoint import arguments, compare, locate, read
from svf.attach import PeftConfig
from tasks.analyze import AnalyzingTrainer
from tasks.run import (
    Checkpoints,
    FileLogger,
    Media,
    NotFinite,
    Predictions,
    Report,
    RunProgress,
    RunWandbLogger,
    StopAtNaN,
    Stopped,
    UserError,
    fail,
    find_checkpoint,
    read_run_checkpoint,
    say,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RUNS = Path("runs")
SUBCOMMANDS = ("fit", "validate", "test", "predict", "analyze")
SHORT = {"early_exit": "model.early_exit", "media_every": "media.every"}
"""Keys that may be written without their section."""


# ----------------------------------------------------------------------------------------------------------------------
# Words -> arguments


def spell(words: list[str]) -> list[str]:
    """Spells `task=maze key=value` out as LightningCLI's arguments; what already is one stays as it is.

    `ckpt_path=last|best` becomes the path of a checkpoint, and the settings it was trained with are put behind the
    task's file, so that they hold unless an overlay or the command line says otherwise.

    Raises:
        UserError: for a word that cannot be one, an unknown task or overlay, or no such checkpoint.
    """
    words = list(words)
    subcommand = words.pop(0) if words and words[0] in SUBCOMMANDS else "fit"
    tasks, overlays, rest = [], [], []
    while words:
        word = words.pop(0)
        key, equals, value = word.lstrip("-").partition("=")
        key = SHORT.get(key, key)
        if word.startswith("-") and not equals and words and not re.match(r"--|[\w.+]+=", words[0]) and key != "help":
            value, equals = words.pop(0), "="
        if not word.startswith("-") and not equals:
            raise UserError(
                f"cannot read {word!r}: arguments are key=value, and the first may be one of {', '.join(SUBCOMMANDS)}"
            )
        if key in ("config", "c"):
            (overlays if "overlay" in Path(value).parts[:-1] else tasks).append(config_file(value))
        elif key == "task" and not word.startswith("-"):
            tasks.append(named_config(value, "task"))
        elif key == "overlay":
            overlays.append(named_config(value, "overlay", CONFIGS / "overlay"))
        else:
            if key == "model.base" and Path(value).is_file():
                value = str(Path(value).resolve())  # what is trained on it will look for it there
            rest.append(f"--{key}={value}" if equals else f"--{key}")

    stored = []
    given = {key: value for key, _, value in (word.lstrip("-").partition("=") for word in rest)}
    if ckpt := given.get("ckpt_path"):
        task = next((name for name in map(task_of, reversed(tasks)) if name), None)
        path = find_checkpoint(RUNS, ckpt, task, given.get("run")) if ckpt in ("last", "best") else locate(ckpt)
        checkpoint = read_run_checkpoint(path)
        theirs = checkpoint["config"].get("task")
        if task and theirs and task.partition("/")[0] != theirs.partition("/")[0]:
            raise UserError(f"ckpt_path: {path} is a checkpoint of task={theirs}, not of task={task}")
        say(f"checkpoint: {path} (step {checkpoint['global_step']})")
        rest = [f"--ckpt_path={path.resolve()}" if word.startswith("--ckpt_path=") else word for word in rest]
        if subcommand != "fit" and ckpt in (
            "last",
            "best",
        ):  # `run` said whose checkpoint; the test is a run of its own
            rest = [word for word in rest if not word.startswith("--run=")]
        stored = [json.dumps(settings(checkpoint["config"], subcommand, task is None))]
    configs = tasks[:1] + stored + tasks[1:] + overlays
    if brought := brought_along(configs, given):
        configs.insert(0, json.dumps(brought))
    return [subcommand, *(f"--config={config}" for config in configs), *rest]


def settings(config: dict, subcommand: str, nameless: bool) -> dict:
    """What of a run's settings holds for a command on its checkpoint: all to go on, else data and model; its task's
    name only where the command gives none."""
    keep = {"seed_everything", "model", "data"} | ({"trainer", "checkpoint"} if subcommand == "fit" else set())
    keep |= {"task"} if nameless or subcommand == "fit" else set()
    return {key: value for key, value in config.items() if key in keep}


def brought_along(configs: list[str], given: dict[str, str]) -> dict:
    """What a CTM's `model.base` brings along: its sizes and its encoder; its data, also as what may be forgotten.

    Raises:
        UserError: where there is no such checkpoint, or it does not hold a whole model of this package.
    """
    kind, base = None, None
    for config in configs:
        model = content_of(config).get("model") or {}
        kind, base = model.get("class_path", kind), (model.get("init_args") or {}).get("base", base)
    base = given.get("model.base", base)
    if kind != "ctm.lit.LitCTM" or base in (None, "null"):
        return {}
    try:
        checkpoint = read(base)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"model.base: {error}") from error
    if "ctm" not in checkpoint or "adapter" in checkpoint:
        raise UserError(f"model.base: {base} does not hold a whole model of this package")
    brought = {"model": {"class_path": kind, "init_args": arguments(checkpoint["ctm"])}}
    if data := checkpoint.get("config", {}).get("data"):
        brought["data"] = brought["model"]["init_args"]["old"] = data
    return brought


def named_config(name: str, kind: str, folder: Path = CONFIGS) -> str:
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = [p for p in sorted(folder.rglob("*.yaml")) if kind == "overlay" or task_of(str(p))]
        known = [str(p.relative_to(folder).with_suffix("")) for p in known]
        raise UserError(f"there is no {kind} {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return str(path)


def config_file(value: str) -> str:
    if not Path(value).is_file():
        raise UserError(f"there is no configuration file {value!r}")
    return value


def task_of(config: str) -> str | None:
    """The name of the task that a file configures; it says so itself."""
    return content_of(config).get("task")


def content_of(config: str) -> dict:
    """What `--config` was given: a file, or its content."""
    content = yaml.safe_load(config if config.startswith("{") else Path(config).read_text())
    return content if isinstance(content, dict) else {}


def without_classes(config: dict) -> dict:
    """A configuration as a person writes it: a class's arguments right under its key, beside its name."""
    plain = {}
    for key, value in config.items():
        if isinstance(value, dict) and "class_path" in value:
            value = {"class": value["class_path"]} | (value.get("init_args") or {})
        plain[key] = without_classes(value) if isinstance(value, dict) else value
    return plain


def nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


# ----------------------------------------------------------------------------------------------------------------------
# LightningCLI


class Parser(LightningArgumentParser):
    """Takes no abbreviated keys, and answers errors in one line that names the key and the nearest valid one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"allow_abbrev": False})  # in the parsers it makes for classes, too

    def parse_args(self, args: Sequence[str] | None = None, *others, **options):
        """jsonargparse hands the null of a class's argument to that class's parser as None, which is a word to it."""
        if args and not self.exit_on_error:
            args = [f"{word.removesuffix('=None')}=null" if word.endswith("=None") else word for word in args]
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None):
        if not self.exit_on_error:  # an inner parser: the outer one asks it, and says what matters
            super().error(message, ex)
        fail(explain(message, self))


UNKNOWN = re.compile(
    r"[Uu]nrecognized arguments: (?:--)?([\w.+]+)|Option '([\w.]+)' is not accepted"
    r"|[Kk]ey ['\"]?([\w.]+)['\"]? is not (?:expected|accepted)|does not accept (?:nested )?(?:option|key) '([\w.]+)'"
)


def explain(message: str, parser: Parser) -> str:
    """What a person can act on in a message of the parser."""
    text = " ".join(line.strip(" -") for line in str(message).splitlines())
    if "arguments are required: fit.model" in text or 'Key "model" is required' in text:
        return "name a task, as in: python train.py task=maze"
    words = [word.lstrip("-") for word in sys.argv[1:] if not word.startswith("--config=")]

    def typed(key: str) -> str | None:
        """The word a person wrote for a key that the parser knows without its prefix."""
        return next((w for w in words if w.partition("=")[0] == key or w.partition("=")[0].endswith("." + key)), None)

    if match := UNKNOWN.search(text):
        key = next(group for group in match.groups() if group)
        full = (typed(key) or key).partition("=")[0].replace(".init_args", "")
        return f"unknown key {full!r}{nearest(full, known_keys(parser))}"
    path = ".".join(re.findall(r'[Pp]arser key "([\w.]+)"', text))
    if match := re.search(r"Expected a dot import path string: (\S+)", text):
        near = nearest(match[1], list(subclasses(PeftConfig))) if path == "model.adapter" else ""
        return f"{path}={match[1]}: there is no such class{near}"
    if match := re.search(r"the following arguments are required: (\w+)", text):
        return f"{path}.{match[1]} is required"
    value = re.search(r"Expected an? (.*?)\. Got value: (.*?)(?:\.? |$)", text)
    nested = re.search(r"NestedArg\(key='([\w.]+)'", text)
    key = nested or re.search(r'(?:Parser key|[Kk]ey) "([\w.]+)"|^([\w.]+): ', text)
    if key and value:
        name = next(group for group in key.groups() if group).replace("init_args.", "")
        kind = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", value[1]))
        return f"{typed(name) or f'{name}={value[2]}'}: expected {kind}"
    if union := re.findall(
        r'arser key "([\w.]+)": Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] ', text
    ):
        name, kinds = union[-1]  # the innermost
        kinds = [kind.replace("NoneType", "null") for kind in re.findall(r"<class '([\w.]+)'>", kinds)]
        return f"{typed(name) or name}: expected {' or '.join(kinds)}"
    return text


def known_keys(parser: Parser) -> list[str]:
    """Every key that a person can write: the parser's own, and those of the classes that files and words choose."""
    subcommand = next((name for name in SUBCOMMANDS if name in sys.argv[1:2]), None)
    parser = (getattr(parser, "_subcommands_action", None) and parser._subcommands_action.choices[subcommand]) or parser
    keys = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    for word in sys.argv[1:]:
        key, _, value = word.lstrip("-").partition("=")
        if key == "config":
            for part, chosen in content_of(value).items():
                keys |= set(chosen_keys(chosen, part))
        elif cls := subclasses(PeftConfig).get(value.rpartition(".")[2]):
            keys |= set(signature_keys(cls, key))
    return sorted(key for key in keys if not key.endswith("help"))


def chosen_keys(chosen: object, prefix: str) -> Iterator[str]:
    """Keys of a class that a file chooses by `class_path`, and of the classes chosen for its arguments."""
    if not isinstance(chosen, dict) or not {"class_path", "init_args"} & set(chosen):
        return
    module, _, name = chosen.get("class_path", "").rpartition(".")
    if module:
        yield from signature_keys(getattr(importlib.import_module(module), name), prefix)
    for argument, value in (chosen.get("init_args") or {}).items():
        yield from chosen_keys(value, f"{prefix}.{argument}")


def subclasses(cls: type) -> dict[str, type]:
    """All classes under one, by name."""
    direct = cls.__subclasses__()
    return {sub.__name__: sub for sub in direct} | {k: v for sub in direct for k, v in subclasses(sub).items()}


def signature_keys(cls: type, prefix: str) -> Iterator[str]:
    """`prefix.argument`, and `prefix.argument.field` where the argument is a dataclass."""
    for name, parameter in list(inspect.signature(cls).parameters.items()):
        yield f"{prefix}.{name}"
        for field in getattr(parameter.annotation, "__dataclass_fields__", ()):
            yield f"{prefix}.{name}.{field}"


class RunConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder; a resumed run with other settings writes its own beside it."""

    def setup(self, trainer: Trainer, pl_module, stage: str) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        folder = Path(trainer.default_root_dir)
        text = self.parser.dump(self.config, skip_none=False)
        path, n = folder / "config.yaml", 1
        while path.exists() and path.read_text() != text:
            n += 1
            path = folder / f"config-{n}.yaml"
        path.write_text(text)


class CLI(LightningCLI):
    """`train.py`'s command line. Trains, then tests the best checkpoint; every run has a folder of its own."""

    def __init__(self):
        super().__init__(
            parser_class=Parser,
            save_config_callback=RunConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            model_class=None,
            trainer_class=AnalyzingTrainer,
            parser_kwargs={name: {"default_config_files": [str(CONFIGS / "base.yaml")]} for name in SUBCOMMANDS},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {"analyze": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--task", type=str | None, default=None, help="Name of the task: runs are kept under it.")
        parser.add_argument("--run", type=str | None, default=None, help="Name of the run; the time where not given.")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Media, "media")
        parser.link_arguments("data", "model.init_args.task", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """A value that a class of ours refuses is the user's to put right."""
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            raise UserError(f"trainer: {error}") from error
        except (ValueError, ArgumentError) as error:
            cause = error
            while inner := cause.__cause__ or cause.__context__:
                cause = inner
            if not isinstance(cause, ValueError):
                raise
            raise UserError(str(cause)) from error

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's settings beat the command line here; `spell` has put them below it."""

    # ------------------------------------------------------------------------------------------------------- the run
    def instantiate_trainer(self, **kwargs) -> Trainer:
        """Model and data stand; nothing has been written yet. What can be refused is refused here."""
        config, checkpoints = self.config[self.subcommand], self._get(self.config_init, "checkpoint")
        plain = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
        path = config.get("ckpt_path")
        content = read_run_checkpoint(Path(path)) if path else {}
        if content and (difference := compare(self.model.state_dict(), content["state_dict"])):
            raise UserError(f"{path} does not fit this model: {difference}")
        self.folder = self._run_folder(Path(path) if path else None)
        if self.subcommand == "fit" and (states := content.get("optimizer_states")):
            groups = [states[0]["param_groups"], self.model.configure_optimizers()["optimizer"].param_groups]
            if len({tuple(len(group["params"]) for group in part) for part in groups}) > 1:
                raise UserError(
                    f"{path} cannot be continued by an optimiser of other parts: leave model.optim.muon and"
                    " model.optim.no_decay as they were, or begin a new run from its weights, without ckpt_path, by"
                    f" model.base={path}"
                )
        step = content["global_step"] if content and self.resumes else 0
        wandb_id = content.get("wandb_id") if self.resumes else None
        checkpoints.folder, checkpoints.config = self.folder / "checkpoints", plain
        checkpoints.wandb_id = wandb_id or os.urandom(4).hex()
        loggers = config.trainer.logger
        if self.subcommand == "analyze":
            if not self.datamodule.in_ticks:
                raise UserError("analyze shows how a model thinks tick by tick; this task is not solved in ticks")
            if min(config.n, config.shown) < 1:
                raise UserError(f"n={config.n} and shown={config.shown} must be at least 1")
            kwargs["logger"] = False  # what it finds is in the report
        elif loggers in (None, True):
            wandb = RunWandbLogger(
                headline=getattr(self.datamodule, "headline", None), name=self.folder.name, project="ctm",
                group=config.get("task"), job_type=self.subcommand, config=without_classes(plain),
                save_dir=str(self.folder), id=checkpoints.wandb_id, resume="allow", log_model=False,
            )  # fmt: skip
            loggers = [FileLogger(self.folder, step), wandb]
            kwargs["logger"] = loggers
        mine = [RunProgress(), StopAtNaN(), Report(self.folder, path)]
        if self.subcommand == "predict":
            mine.append(Predictions(self.folder))
        self.trainer_defaults["callbacks"] = mine
        if self.subcommand != "analyze":  # reads its checkpoint itself
            self.config_init[self.subcommand]["weights_only"] = True
            if content and Path(path).suffix == ".safetensors":  # a model alone: a run from its weights, at step 0
                self.model.load_state_dict(content["state_dict"])
                self.config_init[self.subcommand]["ckpt_path"] = None
        if self.subcommand in ("validate", "test"):
            self.config_init[self.subcommand]["verbose"] = False  # Report says it in a line
        trainer = super().instantiate_trainer(default_root_dir=str(self.folder), **kwargs)
        try:
            self._make_run_folder()
        except FileExistsError:  # another process began in the same second: once more, under another name
            return self.instantiate_trainer(**kwargs)
        return trainer

    def _run_folder(self, ckpt: Path | None) -> Path:
        """The folder of the run that goes on, or one for a new run, not made yet."""
        config = self.config[self.subcommand]
        task = config.get("task") or type(self.datamodule).__name__.removesuffix("Task").lower()
        name, self.resumes = config.get("run"), False
        if "CTM_RUN_FOLDER" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            return Path(os.environ["CTM_RUN_FOLDER"])  # started by the first process
        if ckpt and self.subcommand == "fit" and ckpt.name == "last.ckpt" and ckpt.parent.name == "checkpoints":
            self.resumes = name in (None, ckpt.parent.parent.name)
            if self.resumes:
                return ckpt.parent.parent
        if name and (RUNS / task / name).exists():
            hint = f"continue it with ckpt_path=last, or choose another name than run={name}"
            raise UserError(f"the run folder {RUNS / task / name} exists already: {hint}")
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S") + ("" if self.subcommand == "fit" else f"-{self.subcommand}")
        if not name and (RUNS / task / stamp).exists():
            stamp += f"-{os.urandom(2).hex()}"
        return RUNS / task / (name or stamp)

    def _make_run_folder(self) -> None:
        """Made last, when everything else stands.

        Raises:
            FileExistsError: where another process has made it by now.
            UserError: where it cannot be made.
        """
        if "LOCAL_RANK" not in os.environ or os.environ["LOCAL_RANK"] == "0":
            try:
                self.folder.mkdir(parents=True, exist_ok=self.resumes)
            except OSError as error:
                if isinstance(error, FileExistsError) and self.folder.is_dir():
                    raise
                raise UserError(f"cannot make the run folder {self.folder}: {error.strerror}") from error
        os.environ["CTM_RUN_FOLDER"] = str(self.folder)
        say(f"run: {self.folder}" + (" (continued)" if self.resumes else ""))

    def before_fit(self) -> None:
        self._before()

    def before_validate(self) -> None:
        self._before()

    def before_test(self) -> None:
        self._before()

    def before_predict(self) -> None:
        self._before()

    def before_analyze(self) -> None:
        RunConfig(self._parser("analyze"), self.config["analyze"]).setup(self.trainer, self.model, "analyze")
        self._before()

    def _before(self) -> None:
        n = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        say(f"{self.datamodule.describe()}\nmodel: {n:,} parameters to train")
        if self.subcommand != "fit" and not self.config[self.subcommand].get("ckpt_path"):
            say("warning: no ckpt_path is given, this model is untrained")

    def after_fit(self) -> None:
        """The test set is read once, by the checkpoint that did best in validation."""
        folder = self.folder / "checkpoints"
        best = next((path for path in (folder / "best.ckpt", folder / "last.ckpt") if path.is_file()), None)
        if best and not self.trainer.fast_dev_run:
            self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=str(best), verbose=False, weights_only=True
            )
            save_adapter = getattr(self.model, "save_adapter", None)
            if self.trainer.is_global_zero and save_adapter and save_adapter(self.folder / "adapter"):
                say(f"adapter: {self.folder / 'adapter'}")


def main() -> None:
    """Runs the command line in `sys.argv`, already spelled out."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what matters of it is said in `say`
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")  # Lightning's, of PyTorch
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # making mazes is fast
    warnings.filterwarnings("ignore", message=".*custom batch sampler.*")  # it returns all samples
    warnings.filterwarnings(
        "ignore", message=".*in eval mode at the start of training.*"
    )  # BatchNorms of a frozen base
    warnings.filterwarnings("ignore", message=".*loftq_config.*")  # PEFT's own default, once it was written to a file
    try:
        CLI()
    except Stopped as stop:
        fail(f"{stop}; continue with ckpt_path=last", 128 + stop.signum)
    except NotFinite as error:
        fail(str(error), 1)
    except UserError as error:
        fail(str(error))
