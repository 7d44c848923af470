"""Build backend: setuptools, plus torch as a build requirement only where the installing environment has none.

pip builds in an isolated environment, yet `sysconfig` there still names the site-packages of the interpreter that
installs. If torch lies there, setup.py builds against its headers and nothing is downloaded.
"""

from __future__ import annotations

from setuptools.build_meta import *  # noqa: F403  (the hooks of PEP 517 and 660 that stay as they are)
from torch_location import find_torch


def _torch() -> list[str]:
    return [] if find_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return _torch()


def get_requires_for_build_editable(config_settings=None):
    return _torch()
