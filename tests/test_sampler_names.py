"""Short names of samplers and guidances."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from cogvideox.build import resolve
from cogvideox.diffusion.names import GUIDANCES, SAMPLERS, target_of


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_name_leads_to_a_sampler(name: str) -> None:
    parameters = inspect.signature(resolve(target_of(name, SAMPLERS, "sampler"))).parameters
    assert list(parameters)[:3] == ["denoise", "x", "schedule"]
    assert {"steps", "noise", "callback"} <= parameters.keys()


@pytest.mark.parametrize("name", GUIDANCES)
def test_every_guidance_name_leads_to_a_guidance(name: str) -> None:
    assert resolve(target_of(name, GUIDANCES, "guidance"))()(3, 500, 50) >= 1


def test_an_import_path_stays_as_it_is() -> None:
    assert target_of("my.own.sampler", SAMPLERS, "sampler") == "my.own.sampler"


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("huen", "heun"), ("dpm++_2m", "dpmpp_2m"), ("UniPC", "unipc")]
)
def test_an_unknown_name_gets_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError) as error:
        target_of(wrong, SAMPLERS, "sampler")
    assert str(error.value).startswith(
        f"sampler={wrong}: did you mean {nearest}? the known ones are ddim, euler"
    )


def test_names_are_known_without_torch() -> None:
    code = "import sys, cogvideox.diffusion.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
