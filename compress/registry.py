"""Methods, masks, updates and allocations by the names that recipes use. A new one is one file, inside the package or not."""

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from paredown.compress.errors import PareError, did_you_mean

ENTRY_POINTS = "paredown.methods"  # under this group installed packages list the modules that register something

T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Option:
    """One field of a registered dataclass, as a recipe sets it."""

    type: Any
    required: bool


class OwnOptions(ABC):
    """A class that reads the options of a recipe by itself, because they are more than its fields."""

    @classmethod
    @abstractmethod
    def from_options(cls, name: str, options: Mapping[str, Any]) -> Self:
        """Raises PareError listing every fault at once."""


def accept(name: str, registered: Any) -> None:
    """Refuse nothing."""


class Registry(Generic[T]):
    """Frozen dataclasses by name; their fields are the options of a recipe.

    The files of `package` are imported when a name is first looked up, and so are the modules that installed packages
    list under the entry point group `paredown.methods`. `check_class(name, cls)` is called when a class registers and
    `check_object(name, object)` when one is built: each refuses by raising PareError.
    """

    def __init__(
        self,
        what: str,
        package: str,
        check_class: Callable[[str, type], None] = accept,
        check_object: Callable[[str, T], None] = accept,
    ) -> None:
        self.what, self._package = what, package
        self._check_class, self._check_object = check_class, check_object
        self._classes: dict[str, type] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """A decorator that makes a dataclass known under `name`.

        The same class defined again, as a notebook does, replaces the first. Raises PareError for a name that another
        class has, and for a class that cannot be used.
        """

        def add(cls: C) -> C:
            if not cls.__module__.startswith(self._package):
                self._load()  # first, so that the names of this package are taken
            if "__dataclass_fields__" not in vars(cls):
                raise PareError(
                    f"{self.what} {name!r}: {cls.__qualname__} is no dataclass. "
                    "Add @dataclass(frozen=True) below the line that registers it."
                )
            self._check_class(name, cls)
            known = self._classes.get(name)
            if known is not None and _identity(known) != _identity(cls):
                raise PareError(
                    f"the {self.what} name {name!r} is taken by {'.'.join(_identity(known))}. Register under another name."
                )
            self._classes[name] = cls
            return cls

        return add

    def classes(self) -> dict[str, type]:
        """All classes by name, sorted."""
        self._load()
        return dict(sorted(self._classes.items()))

    def get(self, name: str) -> type:
        """The class of this name. Raises PareError for an unknown one."""
        known = self.classes()
        if name not in known:
            raise PareError(f"unknown {self.what} {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}.")
        return known[name]

    def build(self, name: str, options: Mapping[str, Any]) -> T:
        """The object of this name with its options. Raises PareError listing every fault at once."""
        cls = self.get(name)
        if issubclass(cls, OwnOptions):
            built: Any = cls.from_options(name, options)
        else:
            known = option_fields(cls)
            faults = unknown_options(name, options, known)
            values = parse_options(name, options, known, faults)
            if faults:
                raise PareError("\n".join(faults))
            built = cls(**values)
        self._check_object(name, built)
        return cast(T, built)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # from here on: what is imported may look names up itself
        try:
            package = importlib.import_module(self._package)
            for module in pkgutil.walk_packages(package.__path__, f"{self._package}."):
                importlib.import_module(module.name)
            for point in entry_points(group=ENTRY_POINTS):
                try:
                    point.load()
                except Exception as fault:  # other people's code: whatever it raises is reported with its name
                    raise PareError(
                        f"the installed plugin {point.name!r} ({point.value}) cannot be imported: {fault!r}. "
                        "Correct it or uninstall it."
                    ) from fault
        except BaseException:
            self._loaded = False
            raise


def option_fields(cls: type) -> dict[str, Option]:
    """What a recipe can set of a registered dataclass, by name."""
    types = get_type_hints(cls, include_extras=True)
    return {
        f.name: Option(types[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(cls)
        if f.init
    }


def unknown_options(name: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """A sentence for each option that `name` does not have."""
    return [f"{name} has no option {key!r}.{did_you_mean(str(key), known)}" for key in options if key not in known]


def parse_options(
    name: str, options: Mapping[str, Any], known: Mapping[str, Option], faults: list[str]
) -> dict[str, Any]:
    """The values of the known options, checked against their types. Adds a sentence to `faults` for each wrong one."""
    values: dict[str, Any] = {}
    for key in [key for key in known if key in options]:
        try:
            values[key] = TypeAdapter(known[key].type).validate_python(options[key])
        except ValidationError as fault:
            first = fault.errors()[0]
            own = first.get("ctx", {}).get("error")
            path = ".".join([name, key, *map(str, first["loc"])])
            faults.append(
                f"{path}: {own}" if isinstance(own, PareError) else f"{path}: {first['input']!r}: {first['msg']}"
            )
    faults += [f"{name} needs the option {key!r}" for key, o in known.items() if o.required and key not in options]
    return values


def load_plugin(path: Path) -> None:
    """Run a Python file that registers something. Raises PareError naming the file if it cannot be run."""
    path = path.expanduser().resolve()
    name = f"paredown_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if not path.is_file():
        raise PareError(f"the plugin {path} does not exist. Name a Python file.")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PareError(f"the plugin {path} is no Python file. Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module of their class
    try:
        spec.loader.exec_module(module)
    except PareError as fault:
        raise PareError(f"{path}: {fault}") from fault
    except Exception as fault:  # other people's code: whatever it raises is reported with its name
        raise PareError(f"the plugin {path} cannot be run: {type(fault).__name__}: {fault}") from fault


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
