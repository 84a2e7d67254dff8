"""Hydra's compose, called in one place: recipe and overrides to one plain mapping, with where each value came from.

The recipe is the primary config. Search order: `./recipes`, `./conf`, then the shipped ones, then the registries of
the project (`launcher=local` works without a file). Hydra finds files, follows `defaults:` and merges; it writes
nothing, and neither its own settings nor `_target_` nor resolvers of others are let through.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.base.errors import CptError, UsageError
from cpt.base.registry import nearest, unknown
from cpt.config import overrides as ov
from cpt.config.schema import ROOT, Part, Section
from cpt.config.suggest import dotted, quote_hint

DEFAULT = "default"
_RESOLVER = re.compile(r"(?<!\\)\$\{\s*([^{}:$\s]+)\s*:")
OUR_RESOLVERS = ("law",)


@dataclass(frozen=True)
class Composed:
    """A recipe with the overrides applied."""

    recipe: str  # name, for messages and the run's name
    file: Path
    config: dict[str, Any]
    origins: Mapping[tuple[str, ...], str] = field(default_factory=dict)  # leaf key -> file or override
    notes: tuple[str, ...] = ()  # what overrides do that may not be meant, one sentence each

    def origin(self, path: tuple[str, ...]) -> str:
        """Where the value of a key came from: files, the command line, or the default."""
        below = [where for key, where in self.origins.items() if key[: len(path)] == path]
        if below:
            return ", ".join(dict.fromkeys(below))
        above = next((self.origins[path[:i]] for i in range(len(path), 0, -1) if path[:i] in self.origins), None)
        return above or DEFAULT


def shipped() -> tuple[Path, Path]:
    """The folders of recipes and of config groups that come with the project: in a wheel, or in the checkout."""
    import cpt

    package = Path(cpt.__file__).resolve().parent
    root = package / "_shipped" if (package / "_shipped").is_dir() else package.parent
    return root / "recipes", root / "conf"


def recipe_folders(cwd: Path | None = None) -> list[Path]:
    """Folders that hold recipes, the person's own first."""
    here = (cwd or Path.cwd()) / "recipes"
    found = [here, shipped()[0]]
    return [f for i, f in enumerate(found) if f.is_dir() and f.resolve() not in {x.resolve() for x in found[:i]}]


def conf_folders(cwd: Path | None = None) -> list[Path]:
    """Folders that hold config groups, the person's own first."""
    found = [(cwd or Path.cwd()) / "conf", shipped()[1]]
    return [f for i, f in enumerate(found) if f.is_dir() and f.resolve() not in {x.resolve() for x in found[:i]}]


def recipe_files(cwd: Path | None = None) -> dict[str, Path]:
    """All recipes by name; the person's own hides a shipped one of the same name."""
    found: dict[str, Path] = {}
    for folder in recipe_folders(cwd):
        for path in sorted(folder.glob("*.yaml"), key=lambda p: p.stem):
            found.setdefault(path.stem, path)
    return found


def recipe_names(cwd: Path | None = None) -> list[str]:
    """The names that `recipe=` takes."""
    return sorted(recipe_files(cwd))


def find_recipe(name: str, cwd: Path | None = None) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = (cwd or Path.cwd()) / Path(name).expanduser()
        if path.suffix == ".yml" and path.is_file():
            raise UsageError(f"`{name}`: the name of a recipe file ends with `.yaml`")
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
            hint = (
                f"did you mean `recipe={path.parent.name}/{near}`?"
                if near
                else "`cpt recipes` lists those that have a name"
            )
            raise UsageError(f"there is no recipe file `{name}`", hint)
        return path.resolve()
    files = recipe_files(cwd)
    if name not in files:
        error = unknown("recipe", name, files)
        raise UsageError(
            error.message, *error.hints, "`cpt recipes` lists them, `recipe=path/to/file.yaml` takes a file"
        )
    return files[name].resolve()


def compose(texts: Sequence[str], cwd: Path | None = None) -> Composed:
    """A recipe with overrides, as one plain mapping.

    Args:
        texts: `recipe=NAME` and other overrides, as typed.
        cwd: the folder that `./recipes` and `./conf` lie in.

    Raises:
        UsageError: no recipe, a file that cannot be read, an override that cannot be applied. All that can be seen
            without the composed recipe is reported together.
    """
    cwd = cwd or Path.cwd()
    parsed = _parse_all(texts)
    if parsed.recipe is None:
        meant = [o.text for o in parsed.values if len(o.path) == 1 and nearest(o.path[0], ["recipe"])]
        if meant:
            key, _, value = meant[0].lstrip("+~").partition("=")
            raise UsageError(f"unknown key `{key}`", f"did you mean `recipe={value}`?")
        raise UsageError("no recipe was given", "`recipe=demo` needs nothing; `cpt recipes` lists the others")
    return _composed(find_recipe(parsed.recipe, cwd), parsed.values, cwd)


def compose_part(group: str, texts: Sequence[str], cwd: Path | None = None) -> Composed:
    """One part of a recipe by itself, such as `launcher`, from `launcher=NAME` and `launcher.key=value`.

    Raises:
        UsageError: as `compose`; also when another key is given.
    """
    from hydra.core.config_store import ConfigStore

    cwd = cwd or Path.cwd()
    parsed = _parse_all(texts)
    errors = [_only_part(group, key) for key in ("recipe",) if parsed.recipe is not None]
    errors += [_only_part(group, o.path[0]) for o in parsed.values if o.path[0] != group]
    if errors:
        raise UsageError(errors[0].message, *errors[0].hints, more=tuple(errors[1:]))
    name = f"only_{group}"
    ConfigStore.instance().store(name=name, node={}, provider="cpt")  # a recipe that holds nothing
    return _composed(shipped()[1] / f"{name}.yaml", parsed.values, cwd)


def _only_part(group: str, key: str) -> UsageError:
    if key == "recipe":
        return UsageError(f"`recipe` has no effect here, only `{group}` has", "`cpt plan recipe=...` checks a recipe")
    hints = [f"did you mean `{group}`?"] if nearest(key, [group]) else []
    hints = hints or ["with `recipe=NAME` in front, every key of a recipe has"]
    return UsageError(f"`{key}` has no effect here, only `{group}` has", *hints)


def _composed(file: Path, overrides: Sequence[ov.Override], cwd: Path) -> Composed:
    """A file with the overrides applied."""
    picks, values = _split_picks(overrides, cwd)
    config, origins = _hydra(file, picks, cwd)
    errors: list[CptError] = []
    notes = ov.repeated(overrides)
    for override in values:
        try:
            dropped = ov.replaced(config, override)
            notes += [dropped] if dropped else []
            config = ov.apply(config, override)
            _note_origin(origins, override)
        except CptError as error:
            errors.append(error)
    if errors:
        raise UsageError(errors[0].message, *errors[0].hints, more=(*errors[0].more, *errors[1:]))
    _refuse_foreign(config)
    return Composed(file.stem, file, _resolved(config), origins, tuple(notes))


def _parse_all(texts: Sequence[str]) -> ov.Overrides:
    """Parse each text, so that every wrong one is reported."""
    errors: list[CptError] = []
    good = []
    for text in texts:
        try:
            ov.parse([text])
            good.append(text)
        except CptError as error:
            errors.append(error)
    try:
        parsed = ov.parse(good)
    except CptError as error:
        errors.append(error)
    if errors:
        raise UsageError(errors[0].message, *errors[0].hints, more=tuple(errors[1:]))
    return parsed


def _split_picks(values: Sequence[ov.Override], cwd: Path) -> tuple[list[tuple[str, str]], list[ov.Override]]:
    """Overrides that pick an option of a config group (`launcher=slurm`, `model=llama-1m`), and the rest."""
    picks, rest = [], []
    for override in values:
        group = override.path[0]
        single = len(override.path) == 1 and override.operation != "remove" and isinstance(override.value, str)
        options = group_options(group, cwd) if single else []
        node = ROOT.keys.get(group)
        if override.value in options:
            picks.append((group, str(override.value)))
        elif options and isinstance(node, Section) and node.short is None:
            raise unknown(group, override.value, options)
        elif options and isinstance(node, Part):  # a class of the project or a file in `conf`
            error = unknown(node.registry().kind, override.value, options)
            raise UsageError(error.message, *error.hints, *_own_file(group, override.value, cwd))
        else:
            rest.append(override)
    return picks, rest


def _own_file(group: str, option: object, cwd: Path) -> list[str]:
    """Where the file of a cluster goes, and what it can begin as a copy of."""
    if group != "launcher" or not re.fullmatch(r"[\w.-]+", str(option)):
        return []
    own, example = cwd / "conf" / group / f"{option}.yaml", shipped()[1] / group / "slurm-example.yaml"
    return [f"a cluster of yours is a file `{own}`, which can begin as a copy of `{example}`"]


def group_options(group: str, cwd: Path | None = None) -> list[str]:
    """Options of a config group: files in `conf/<group>/` and, for a part, its registered classes."""
    names = {p.stem for folder in conf_folders(cwd) for p in (folder / group).glob("*.yaml")}
    node = ROOT.keys.get(group)
    if isinstance(node, Part):
        names |= set(node.registry())
    return sorted(names)


def _hydra(
    file: Path, picks: Sequence[tuple[str, str]], cwd: Path
) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """What Hydra makes of the recipe file and the picks: the unresolved mapping, and the origin of each leaf."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    Plugins.instance()
    _store_registries(cwd)
    path = ConfigSearchPathImpl()
    for folder in dict.fromkeys([file.parent, *recipe_folders(cwd), *conf_folders(cwd)]):
        path.append("cpt", f"file://{folder}")
    path.append("schema", "structured://")
    # What `hydra.compose` does, without Hydra's own settings in front: none of them is used, and they take most time.
    repository = CachingConfigRepository(ConfigRepository(config_search_path=path))
    try:
        _refuse_hydra_settings(repository, file)
        defaults = _defaults(repository, file.stem, picks)
        composed = ConfigLoaderImpl(path)._compose_config_from_defaults_list(defaults, repository)
        config: Any = OmegaConf.to_container(composed, resolve=False)
        origins: dict[tuple[str, ...], str] = {}
        for default in defaults:
            name = default.config_path or ""
            loaded = repository.load_config(name)
            if loaded is None:
                continue
            where = f"{name}.yaml" if loaded.path.startswith("file:") else name.replace("/", "=")
            package = tuple(filter(None, (default.package or "").split(".")))
            if where.startswith("launcher/") and package == ("launcher",):
                _refuse_nameless(where, config.get("launcher") or {})
            for leaf in _leaves(OmegaConf.to_container(loaded.config, resolve=False)):
                origins[package + leaf] = where
        return config, origins
    except CptError:
        raise
    except Exception as error:  # Hydra, OmegaConf and PyYAML raise many kinds; all of them are about the person's text
        raise _hydra_error(error, file) from error


def _refuse_nameless(file: str, launcher: Any) -> None:
    """A file of a launcher that does not say which would be taken for one of the default launcher."""
    if not isinstance(launcher, dict) or "name" in launcher:
        return
    known = ", ".join(f"`{name}`" for name in _parts()["launcher"].registry())
    raise UsageError(
        f"`conf/{file}` does not say which launcher it is for: `name` is missing",
        f"for a Slurm cluster its first line is `name: slurm`; known: {known}",
    )


def _defaults(repository: Any, recipe: str, picks: Sequence[tuple[str, str]]) -> list[Any]:
    """The files that a recipe is made of, in the order in which they are merged.

    A pick is `group=option` in Hydra's grammar for a group in the recipe's defaults, `+group=option` for another one.
    """
    from hydra._internal.defaults_list import create_defaults_list
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import ConfigCompositionException

    def listed(texts: list[str]) -> list[Any]:
        overrides = OverridesParser.create().parse_overrides(texts)
        found = create_defaults_list(
            repo=repository, config_name=recipe, overrides_list=overrides, prepend_hydra=False, skip_missing=False
        )
        return list(found.defaults)

    texts: list[str] = []
    for group, option in picks:
        try:
            listed([*texts, f"{group}={option}"])
            texts.append(f"{group}={option}")
        except ConfigCompositionException as error:
            if "No match in the defaults list" not in str(error):
                raise
            texts.append(f"+{group}={option}")
    return listed(texts)


def _store_registries(cwd: Path) -> None:
    """Registered parts as Hydra config groups, so that a recipe's `defaults:` can name them without a file."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for group, part in _parts().items():
        files = {p.stem for folder in conf_folders(cwd) for p in (folder / group).glob("*.yaml")}
        for name in part.registry():
            if name not in files:  # Hydra would take the stored one for a schema of the file
                store.store(group=group, name=name, node={part.select: name}, provider="cpt")


@functools.cache
def _parts() -> dict[str, Part]:
    from cpt.config.schema import LR

    launcher = ROOT.keys["launcher"]
    assert isinstance(launcher, Part)
    return {"launcher": launcher, "schedule": LR}


def _refuse_hydra_settings(repository: Any, file: Path) -> None:
    from omegaconf import OmegaConf

    loaded = repository.load_config(file.stem)
    if loaded is None or not OmegaConf.is_dict(loaded.config):
        raise UsageError(f"`{file.name}` is not a recipe: it holds no keys")
    entries = loaded.defaults_list
    text = str(OmegaConf.to_container(entries, resolve=False) if OmegaConf.is_config(entries) else entries)
    if "hydra/" in text or "hydra" in loaded.config:
        raise UsageError(
            f"`{file.name}` sets `hydra`, which would have no effect: `cpt` uses Hydra to read recipes and nothing else"
        )
    if _RESOLVER.search(text):
        raise UsageError(f"`{file.name}`: `defaults` names files and takes no `${{...:...}}`")


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, (*path, str(key)))
    elif path:
        yield path


def _note_origin(origins: dict[tuple[str, ...], str], override: ov.Override) -> None:
    length = len(override.path)
    for path in [p for p in origins if p[:length] == override.path and isinstance(override.value, dict) is False]:
        del origins[path]
    for leaf in _leaves({"": override.value}):
        origins[override.path + leaf[1:]] = "command line"


def _refuse_foreign(config: dict[str, Any]) -> None:
    """Refuse what is not plain data: keys that are no text, `_target_` and its like, resolvers that are not ours.

    Raises:
        UsageError: all of them together.
    """
    errors: list[CptError] = []

    def walk(value: Any, path: tuple[object, ...]) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                if not isinstance(key, str):
                    where = f" of `{dotted(path)}`" if path else ""
                    hint = quote_hint(key) if isinstance(key, bool) else f'write it in quotes: `"{key}"`'
                    shown = str(key).lower() if isinstance(key, bool) else key
                    errors.append(UsageError(f"the key `{shown}`{where} is not a text", hint))
                elif re.fullmatch(r"_\w+_", key):
                    errors.append(
                        UsageError(f"`{dotted((*path, key))}` is refused: a recipe is data and calls nothing")
                    )
                else:
                    walk(below, (*path, key))
        elif isinstance(value, list):
            for i, below in enumerate(value):
                walk(below, (*path, i))
        elif isinstance(value, str):
            for name in _RESOLVER.findall(value):
                if name not in OUR_RESOLVERS:
                    known = ", ".join(f"`${{{n}:...}}`" for n in OUR_RESOLVERS)
                    errors.append(
                        UsageError(
                            f"`{dotted(path)}` uses the resolver `{name}`, which is not allowed",
                            f"allowed: {known} and other keys, such as `${{train.seq_length}}`",
                        )
                    )

    walk(config, ())
    if errors:
        raise UsageError(errors[0].message, *errors[0].hints, more=tuple(errors[1:]))


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    """The mapping with `${other.key}` filled in; `${law:...}` stays text until the law exists."""
    from omegaconf import OmegaConf

    if not any("${" in text for text in _texts(config)):
        return config
    if not OmegaConf.has_resolver("law"):
        OmegaConf.register_new_resolver("law", lambda *words: "${law:" + ",".join(map(str, words)) + "}")
    try:
        done: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except Exception as error:
        raise _interpolation_error(error, config) from error
    assert isinstance(done, dict)
    return done


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for below in value.values():
            yield from _texts(below)
    elif isinstance(value, list):
        for below in value:
            yield from _texts(below)
    elif isinstance(value, str):
        yield value


def _interpolation_error(error: Exception, config: dict[str, Any]) -> UsageError:
    key = getattr(error, "full_key", None)
    first = str(error).splitlines()[0].rstrip(".").replace("'", "`") if str(error) else type(error).__name__
    if isinstance(error, RecursionError):
        first = "values refer to each other in a circle"
    where = f"`{key}`: " if key else ""
    missing = re.search(r"key `([^`]+)` not found", first)
    near = nearest(missing[1], set(_keys(config)) - {key}) if missing else None
    hints = [f"did you mean `{near}`?"] if near else []
    return UsageError(f"{where}a `${{...}}` cannot be filled in: {first[:1].lower()}{first[1:]}", *hints)


def _keys(value: Any, above: str = "") -> Iterator[str]:
    """The dotted names of all keys that hold a value."""
    if not isinstance(value, dict):
        yield above
        return
    for name, below in value.items():
        yield from _keys(below, f"{above}.{name}" if above else str(name))


def _hydra_error(error: Exception, file: Path) -> UsageError:
    """An exception of Hydra, OmegaConf or PyYAML in the project's words."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    mark = getattr(cause, "problem_mark", None) or getattr(cause, "context_mark", None)
    if mark is not None:
        problem = getattr(cause, "problem", None) or "it cannot be read"
        name = Path(str(mark.name)).name if mark.name else file.name
        return UsageError(
            f"`{name}` is not valid YAML at line {mark.line + 1}: {problem.rstrip('.')}".replace("'", "`")
        )
    if isinstance(cause, UnicodeDecodeError):
        return UsageError(f"`{file}` is not UTF-8 text")
    if isinstance(cause, RecursionError):
        return UsageError(f"`{file}` is nested too deeply, or refers to itself")
    if isinstance(cause, OSError):
        return UsageError(f"`{cause.filename or file}` cannot be read: {(cause.strerror or str(cause)).lower()}")
    text = str(cause)
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if missing:
        return _missing_default(missing[1], file)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(cause).__name__)
    first = first.rstrip(".").replace("'", "`")
    return UsageError(f"`{file.name}` cannot be composed: {first[:1].lower()}{first[1:]}")


def _missing_default(name: str, file: Path) -> UsageError:
    group, _, option = name.rpartition("/")
    known = group_options(group) if group else recipe_names()
    near = nearest(option, known)
    hint = f"did you mean `{near}`?" if near else "known: " + (", ".join(f"`{k}`" for k in known) or "none")
    return UsageError(f"`{file.name}`: `defaults` names `{name}`, which does not exist", hint)
