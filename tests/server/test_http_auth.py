"""AT-1, AT-2, AT-3, AT-8: deny by default, host and path confusion, keys, browsers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from canary import assert_clean
from house import House, completion, read_response
from starlette.routing import Route

from setpoint.errors import ConfigError
from setpoint.server.app import PROBES
from setpoint.server.auth import KeyRing, check_bind, is_loopback

KEY, OTHER = "first-secret-key", "other-secret-key"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
GOOD = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def locked() -> Iterator[House]:
    with House(keys=KeyRing([KEY, OTHER])) as house:
        yield house


def all_paths(house: House) -> list[tuple[str, str]]:
    """(route name, path) of the app's own route table."""
    routes = house.server.config.app.router.routes
    assert all(isinstance(route, Route) or hasattr(route, "path") for route in routes)
    return [(route.name, route.path.replace("{name:path}", "tiny")) for route in routes]


def test_every_route_and_method_is_denied_without_a_key(locked: House) -> None:
    paths = all_paths(locked)
    assert len(paths) >= 14
    with locked.client() as client:
        for name, path in [*paths, ("none", "/nothing"), ("none", "/"), ("none", "/docs")]:
            for method in METHODS:
                response = client.request(method, path)
                if name in PROBES and method == "GET":
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert response.json()["error"]["reason"] == "unauthorized"


def test_only_the_probes_are_open() -> None:
    assert {"startupz", "livez", "readyz", "health", "ping"} == PROBES


def test_metrics_are_open_only_if_configured(locked: House) -> None:
    assert locked.get("/metrics").status_code == 401
    with House(keys=KeyRing([KEY]), open_metrics=True) as house:
        assert house.get("/metrics").status_code == 200
        assert house.get("/v1/models").status_code == 401


def test_each_key_works(locked: House) -> None:
    for key in (KEY, OTHER):
        for scheme in ("Bearer", "bearer", "BEARER"):
            headers = {"Authorization": f"{scheme} {key}"}
            assert locked.get("/v1/models", headers=headers).status_code == 200
    client = locked.openai(api_key=KEY)
    assert client.models.list().data


@pytest.mark.parametrize(
    "value",
    [
        *("", "Bearer", "Bearer x", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer\t{KEY}"),
        *(f"Bearer  x{KEY}", f"Bearer {KEY.upper()}", f"Bearer {KEY},{OTHER}", f"Bearer {KEY} {OTHER}", "Bearer null"),
        *("Bearer undefined", f"Token {KEY}", "Bearer \xe9\xe9", "Bearer " + "x" * 5000),
    ],
)
def test_malformed_headers_are_no_identity(locked: House, value: str) -> None:
    response = locked.get("/v1/models", headers=[(b"Authorization", value.encode("latin-1"))])
    assert response.status_code == 401


def test_two_authorization_headers_are_refused(locked: House) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER}")]
    assert locked.get("/v1/models", headers=headers).status_code == 401


def test_tenants_have_separate_prefix_caches(locked: House) -> None:
    body = completion("a shared prompt of some length " * 5, max_tokens=1)

    def cached(key: str) -> int:
        answer = locked.post("/v1/completions", body, headers={"Authorization": f"Bearer {key}"}).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEY) == 0
    assert cached(OTHER) == 0
    assert cached(KEY) > 0


def test_no_key_in_the_log(locked: House) -> None:
    locked.get("/v1/models", headers=GOOD)
    locked.get("/v1/models", headers={"Authorization": "Bearer wrong-secret-key"})
    assert "secret-key" not in locked.log.getvalue()


# AT-2


PATHS = [
    *("//v1/models", "/v1//models", "/v1/../v1/models", "/v1/./models", "/v1/models/", "/V1/models", "/v1/models%00"),
    *("/livez/../v1/models", "/livez/..%2fv1/models", "/health%2f..%2fv1%2fmodels", "/v1%2fmodels", "/%76%31/models"),
    *("/v1/models?x=/livez", "/v1/models#/livez", "/v1/models;/livez", "/livez/", "/livez/x", "//livez", "/livez%00"),
    *(
        "/livez;x=1",
        "/LIVEZ",
        "/livez%20",
        "/.",
        "/..",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/..",
        "/ping/../metrics",
    ),
    *("/startupz/v1/models", "/v1/models/%2e%2e%2flivez", "/\\livez", "/v1\\models"),
]
HOSTS = [
    *("x/?", "x#", "x@livez", "a b", "", "127.0.0.1/livez", "127.0.0.1?x", "[::1", "::1", "x:y", "x:1:2", "x:999999"),
    *("livez/", "\x7f", "a,b", "%31", "http://x"),
]
FORWARDED = [
    ("X-Forwarded-For", "127.0.0.1"),
    ("X-Forwarded-Host", "127.0.0.1"),
    ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Prefix", "/livez"),
    ("X-Original-URL", "/livez"),
    ("X-Rewrite-URL", "/livez"),
    ("Forwarded", "for=127.0.0.1;host=127.0.0.1"),
    ("X-Real-IP", "127.0.0.1"),
    ("X-HTTP-Method-Override", "GET"),
    ("Via", "1.1 127.0.0.1"),
]


def ask(house: House, request: bytes) -> tuple[int, bytes]:
    with house.connect() as sock:
        sock.sendall(request)
        return read_response(sock)


def test_confused_paths_get_no_further(locked: House) -> None:
    assert len(PATHS) + len(HOSTS) + len(FORWARDED) >= 50
    for path in PATHS:
        for method in ("GET", "POST"):
            request = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode("latin-1")
            status, data = ask(locked, request)
            assert status in (400, 401), (method, path, status)
            assert_clean(data.decode("latin-1"))
    for path in PATHS:  # with a key: never a 5xx, never a file
        lines = f"Host: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
        status, data = ask(locked, f"GET {path} HTTP/1.1\r\n{lines}".encode("latin-1"))
        assert status in (200, 400, 404, 405), (path, status)
        assert b"root:" not in data


def test_bad_hosts_are_refused(locked: House) -> None:
    for host in HOSTS:
        for path in ("/v1/models", "/livez"):
            request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1")
            status, _ = ask(locked, request)
            assert status == 400, host
    for lines in ("", "Host: 127.0.0.1\r\nHost: 127.0.0.1\r\n", "Host: 127.0.0.1\r\nHost: x\r\n"):
        status, _ = ask(locked, f"GET /livez HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
        assert status == 400, lines


def test_forwarded_headers_change_nothing(locked: House) -> None:
    for header in FORWARDED:
        assert locked.get("/v1/models", headers=dict([header])).status_code == 401
        assert locked.get("/v1/models", headers=GOOD | dict([header])).status_code == 200
        assert locked.get("/livez", headers=dict([header])).status_code == 200


def test_absolute_form(locked: House) -> None:
    for target in ("http://127.0.0.1/v1/models", "http://evil/v1/models", "http://evil/livez/../v1/models"):
        status, _ = ask(locked, f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        assert status in (400, 401), target
    for target in ("*", "127.0.0.1:80", "http://", "http://[::1", "?", "livez", "http:/livez"):
        status, _ = ask(locked, f"OPTIONS {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        assert status in (400, 401), target


# AT-3: rotation


def test_keys_from_a_file_rotate_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# team a\n{KEY}\n\n")
    now = 0.0
    ring = KeyRing(file=file, clock=lambda: now)

    def works(key: str) -> bool:
        return ring.tenant([f"Bearer {key}".encode()]) is not None

    assert works(KEY)
    assert not works(OTHER)
    file.write_text(f"{OTHER}\n")
    os.utime(file, ns=(1, 1))
    now = 2.0
    assert works(OTHER)
    assert not works(KEY)
    file.unlink()  # being replaced: the keys stay
    now = 4.0
    assert works(OTHER)
    file.write_text("# no key at all\n")
    now = 6.0
    assert works(OTHER)


def test_bad_key_configuration(tmp_path: Path) -> None:
    for key in ("", "short", "with space inside", "ü" * 10, "x" * 600, "line\nbreak-key"):
        with pytest.raises(ConfigError):
            KeyRing([key])
    with pytest.raises(ConfigError):
        KeyRing(file=tmp_path / "missing")
    (tmp_path / "empty").write_text("\n#\n")
    with pytest.raises(ConfigError):
        KeyRing(file=tmp_path / "empty")


def test_tenants_are_stable_and_distinct() -> None:
    ring = KeyRing([KEY, OTHER])
    tenants = [ring.tenant([f"Bearer {key}".encode()]) for key in (KEY, KEY, OTHER)]
    assert tenants[0] == tenants[1] != tenants[2]
    assert KeyRing([KEY]).tenant([f"Bearer {KEY}".encode()]) == tenants[0]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.com", "", "192.168.1.1"])
def test_public_addresses_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError):
        check_bind(host, KeyRing())
    check_bind(host, KeyRing([KEY]))
    check_bind(host, KeyRing(), allow_open=True)


def test_loopback_needs_none() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        check_bind(host, KeyRing())


# AT-8


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", {"Host": "evil.example"}),
        ("POST", {"Host": "evil.example:8000"}),
        ("DELETE", {"Host": "127.0.0.1.evil.example"}),
        ("GET", {"Host": "localhost.evil.example"}),
        ("POST", {"Origin": "http://evil.example"}),
        ("GET", {"Origin": "https://evil.example"}),
        ("POST", {"Origin": "null"}),
        ("DELETE", {"Origin": "http://evil.example"}),
        ("PUT", {"Origin": "http://127.0.0.1.evil.example"}),
        ("OPTIONS", {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}),
        ("POST", {"Sec-Fetch-Site": "cross-site"}),
        ("GET", {"Sec-Fetch-Site": "same-site"}),
    ],
)
def test_browser_attacks(house: House, method: str, headers: dict[str, str]) -> None:
    with house.client() as client:
        for path in ("/v1/chat/completions", "/v1/models", "/livez"):
            response = client.request(method, path, headers={"Content-Type": "application/json", **headers})
            assert response.status_code == 403
            assert response.json()["error"]["reason"] == "forbidden_origin"
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_own_origin_is_welcome(house: House) -> None:
    for host in (f"127.0.0.1:{house.port}", "localhost", "[::1]:80"):
        assert house.get("/v1/models", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", None]
)
def test_forms_cannot_post(house: House, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    with house.client() as client:
        response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["reason"] == "unsupported_media_type"
