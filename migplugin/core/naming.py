"""What resources are called: the `resources` section of the configuration file.

NVIDIA's plugin parses it and then throws it away. Here its rules are tried in their order and the
first that matches names the device; what no rule matches has the usual name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from migplugin.core.resource import MAX_NAME, NVIDIA, ResourceName, is_domain, is_valid, of_profile
from migplugin.errors import InputError


@dataclass(frozen=True, slots=True)
class Rule:
    """Devices whose product or profile is like `pattern` are called `name`; `*` stands for any text."""

    pattern: str
    name: ResourceName

    def matches(self, text: str) -> bool:
        first, *rest = self.pattern.split("*")
        if not rest:
            return text == first
        *middle, last = rest
        if not (text.startswith(first) and text.endswith(last)) or len(text) < len(first) + len(last):
            return False
        at, end = len(first), len(text) - len(last)
        for part in middle:
            found = text.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return True


@dataclass(frozen=True, slots=True)
class Naming:
    domain: str = NVIDIA
    gpus: tuple[Rule, ...] = ()
    mig: tuple[Rule, ...] = ()

    @property
    def gpu(self) -> ResourceName:
        """The usual name of whole GPUs, and under strategy `single` of MIG devices."""
        return ResourceName(f"{self.domain}/gpu")

    def of_gpu(self, product: str) -> ResourceName:
        return next((rule.name for rule in self.gpus if rule.matches(product)), self.gpu)

    def of_mig(self, profile: str, *, single: bool) -> ResourceName:
        """Rules match the profile as the driver says it, `1g.5gb+me`."""
        usual = self.gpu if single else of_profile(profile, self.domain)
        return next((rule.name for rule in self.mig if rule.matches(profile)), usual)


def naming(document: Mapping[str, Any], domain: str = NVIDIA) -> Naming:
    """The naming that the section `resources` asks for; its shape is checked, its values are not.

    Raises InputError.
    """
    if not is_domain(domain):
        raise InputError(f"--resource-domain={domain[:200]}: expected a DNS name such as {NVIDIA}")
    gpus, mig = (tuple(_rules(document, kind, domain)) for kind in ("gpus", "mig"))
    return Naming(domain, gpus, mig)


def resource_name(given: object, domain: str, path: str) -> ResourceName:
    """`given` as a name that the kubelet takes, with the domain where it has none.

    NVIDIA's files always say `nvidia.com/`, where they say a domain: that stands for ours. Raises InputError.
    """
    if not isinstance(given, str) or not given:
        raise InputError(f"{path}: {short(given)}: expected a resource name such as gpu or {domain}/gpu")
    name = ResourceName(f"{domain}/{given.removeprefix(domain + '/').removeprefix(NVIDIA + '/')}")
    if not is_valid(name):
        raise InputError(
            f"{path}: {short(given)}: the kubelet would refuse {short(name)}: expected at most {MAX_NAME} "
            f"letters, digits, '-', '_' and '.' after {domain}/, the first and the last a letter or a digit"
        )
    return name


def short(value: object) -> str:
    """`value` as Python writes it, at most a line of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rules(document: Mapping[str, Any], kind: str, domain: str) -> Iterator[Rule]:
    for number, given in enumerate(document.get(kind) or ()):
        path = f"resources.{kind}[{number}]"
        rule = given or {}
        pattern = rule.get("pattern")
        if not isinstance(pattern, str) or not pattern:
            example = "a profile such as 1g.5gb" if kind == "mig" else "a product such as *A100*"
            raise InputError(f"{path}.pattern: {short(pattern)}: expected {example}, * for any text")
        yield Rule(pattern, resource_name(rule.get("name"), domain, f"{path}.name"))
