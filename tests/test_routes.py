"""The list of routes: which requests are on it, and which model a path names."""

from __future__ import annotations

import pytest

from llmux_asgi import UnknownModelError
from llmux_asgi._routes import ROUTES, Route, find_route, methods_of, split_model_path

MODELS = {"a", "org/a", "org", "v1", "x/v1/y"}


def known(name: str) -> str | None:
    return name if name in MODELS else None


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_each_route_is_found_by_its_own_method_only(route: Route) -> None:
    path = route.path.replace("{id}", "resp_1")
    methods = {method for method in ("GET", "POST", "WEBSOCKET", "PUT", "HEAD") if find_route(method, path) is not None}
    assert methods == {route.method}
    assert methods_of(path) == [method for method in methods if method != "WEBSOCKET"]


@pytest.mark.parametrize(
    "identifier",
    ["", ".", "..", "...", "a/b", "../sleep", "a b", "a\r\nb", "a\n", "x" * 257, "ü", "a?b", "a%2fb", "a#b", "a\\b"],
)
def test_an_id_that_could_mean_another_path_is_on_no_route(identifier: str) -> None:
    assert find_route("GET", f"/v1/responses/{identifier}") is None
    assert find_route("POST", f"/v1/responses/{identifier}/cancel") is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/completions", None),
        ("/models", None),
        ("/models/a", None),
        ("/models/nobody/sleep", None),
        ("/models/a/v1/x", ("a", "/v1/x")),
        ("/models/org/v1/x", ("org", "/v1/x")),
        ("/models/org/a/v1/x", ("org/a", "/v1/x")),
        ("/models/org/b/v1/x", ("org", "/b/v1/x")),
        ("/models/v1/v1/x", ("v1", "/v1/x")),
        ("/models/x/v1/y/v1/x", ("x/v1/y", "/v1/x")),
        ("/models/a/sleep", ("a", "/sleep")),
    ],
)
def test_the_longest_name_that_is_configured_is_meant(path: str, expected: tuple[str, str] | None) -> None:
    assert split_model_path(path, known) == expected


def test_a_name_that_is_not_configured_is_told() -> None:
    with pytest.raises(UnknownModelError, match="'no/body'"):
        split_model_path("/models/no/body/v1/completions", known)
