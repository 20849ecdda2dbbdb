"""The manifests are what Kubernetes' own schemas allow, and have no field that these do not know."""

from __future__ import annotations

import kubernetes_validate
import pytest

from tests.examples.test_kubernetes import manifests

pytestmark = pytest.mark.packaging

VERSIONS = ["1.29", "1.34"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", list(manifests()))
def test_the_manifests_are_valid(kind: str, version: str) -> None:
    kubernetes_validate.validate(manifests()[kind], version, strict=True)
