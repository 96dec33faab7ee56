"""API keys: who gets in, what each route asks for, and what one key sees of another's."""

import re

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Mount

from service.app import create_app
from service.auth import SCOPES, BadKey, Keys, new_key
from service.deps import Requires
from service.settings import Settings
from tests.stack import RedisServer, Stack, is_alive, run_with, wait_for
from worker.records import connect

# What each route asks for; None: nothing. A new route is written down here, or the test below fails.
ROUTES = {
    "GET /": None,
    "GET /docs": None,
    "GET /openapi.json": None,
    "GET /livez": None,
    "GET /readyz": None,
    "GET /examples": None,
    "GET /examples/{name}.png": None,
    "GET /videos/{job_id}.{suffix}": None,  # a signed link, or a key that may read
    "HEAD /videos/{job_id}.{suffix}": None,
    "GET /models": "read",
    "POST /generate": "generate",
    "GET /generate": "read",
    "GET /generate/{job_id}": "read",
    "GET /generate/{job_id}/events": "read",
    "POST /generate/{job_id}/cancel": "generate",
    "POST /generate/{job_id}/webhook": "generate",
    "DELETE /generate/{job_id}": "generate",
    "GET /v1/models": "read",
    "GET /v1/models/{name}": "read",
    "POST /v1/videos": "generate",
    "GET /v1/videos": "read",
    "GET /v1/videos/{job_id}": "read",
    "DELETE /v1/videos/{job_id}": "generate",
    "GET /v1/videos/{job_id}/content": "read",
    "HEAD /v1/videos/{job_id}/content": "read",
    "POST /v1/videos/{job_id}/remix": "generate",
    **{f"POST /v1/videos/{unoffered}": "generate" for unoffered in ("characters", "edits", "extensions")},
    "GET /metrics": "metrics",
    "POST /admin/distillations": "admin",
    "GET /admin/distillations": "admin",
    "GET /admin/distillations/{job_id}": "admin",
    "POST /admin/distillations/{job_id}/cancel": "admin",
    "POST /admin/distillations/{job_id}/resume": "admin",
    **{
        f"GET /admin/distillations/{{job_id}}/{what}": "admin"
        for what in ("events", "log", "metrics", "samples", "samples/{name}", "checkpoints")
    },
    "GET /admin/recipes": "admin",
    "GET /admin/students": "admin",
    "GET /admin/students/{student}": "admin",
    "POST /admin/students/{student}/promote": "admin",
    "POST /admin/students/rollback": "admin",
    "GET /admin/release": "admin",
    "GET /admin/workers": "admin",
    "GET /admin/queue": "admin",
    "POST /admin/queue/pause": "admin",
    "POST /admin/queue/resume": "admin",
    "GET /admin/webhooks": "admin",
    "POST /admin/webhooks/{job_id}/replay": "admin",
}


def test_every_route_asks_for_the_scope_that_it_should():
    found = {}
    for route in walk(create_app(Settings()).routes):
        if isinstance(route, Mount) or route.path.startswith("/swagger/"):
            continue  # files of the package
        dependencies = route.dependant.dependencies if isinstance(route, APIRoute) else []
        scopes = [one.call.scope for one in dependencies if isinstance(one.call, Requires)]
        assert len(scopes) <= 1, route.path
        for method in route.methods - (set() if "{" in route.path else {"HEAD"}):
            found[f"{method} {route.path}"] = scopes[0] if scopes else None
    assert found == ROUTES


def walk(routes):
    for route in routes:
        if (router := getattr(route, "original_router", None)) is not None:
            yield from walk(router.routes)
        else:
            yield route


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A service that needs keys, without a worker."""
    folder = tmp_path_factory.mktemp("guarded")
    stack = Stack(folder, AUTH="on")
    stack.redis = RedisServer(folder / "redis")
    stack.environment["REDIS_URL"] = stack.redis.url
    stack.redis.start()
    stack.spawn("service")
    wait_for(lambda: is_alive(stack.url), 30, "the service")
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def keys(guarded) -> dict[str, str]:
    """One key for each scope alone."""
    store, made = Keys(connect(guarded.redis.url)), {}
    for scope in SCOPES:
        made[scope] = new_key()
        store.add(made[scope], scope, (scope,))
    return made


# Enough of a request to get past the routing; with the right scope the answer is anything but 401 and 403.
ROUTES_WITH_SCOPE = [route for route, scope in ROUTES.items() if scope]


@pytest.mark.parametrize("route", ROUTES_WITH_SCOPE)
def test_each_scope_opens_its_own_routes_only(guarded, keys, route):
    method, path = route.split(" ")
    job = "dist_" if "distillations" in path else "vid_"
    path = path.replace("{job_id}", job + 26 * "0").replace("{name}", "m")
    with httpx.Client(base_url=guarded.url) as client:
        answer = client.request(method, path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        for scope, key in keys.items():
            status = client.request(method, path, headers={"Authorization": f"Bearer {key}"}).status_code
            assert (status == 403) == (scope != ROUTES[route]), (scope, status)
            assert status != 401


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": "Bearer fl_00000000_" + 43 * "a"},
        {"Authorization": "Bearer sk-something"},
        {"Authorization": b"Bearer fl_00000000_" + 43 * "é".encode()},
        {"X-API-Key": b"\xff\xfe"},
        {"X-API-Key": "fl_"},
        {"X-API-Key": "x" * 5000},
    ],
)
def test_a_wrong_key_is_refused_whatever_is_in_it(guarded, header):
    answer = httpx.get(f"{guarded.url}/generate", headers=header)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "wrong_key")
    assert answer.json()["error"]["type"] == "authentication_error"


def test_half_a_right_key_is_wrong(guarded, keys):
    right = keys["read"]
    for text in (right[:-1] + ("a" if right[-1] != "a" else "b"), right + "a", right.upper(), right[:54]):
        assert httpx.get(f"{guarded.url}/generate", headers={"X-API-Key": text}).status_code == 401
    assert httpx.get(f"{guarded.url}/generate", headers={"X-API-Key": right}).status_code == 200


def test_without_a_key_there_are_the_public_routes(guarded):
    for route in (route for route, scope in ROUTES.items() if scope is None):
        method, path = route.split(" ")
        path = path.replace("{job_id}", "vid_" + 26 * "0").replace("{suffix}", "mp4").replace("{name}", "red-circle")
        status = httpx.request(method, guarded.url + path).status_code
        assert status == {"/readyz": 503}.get(path, 401 if "vid_" in path else 200), path


def test_the_first_start_makes_a_key_and_says_it_once(guarded):
    log = (guarded.folder / "service.log").read_text()
    [text] = re.findall(r"fl_[0-9a-z]{8}_[\w-]{43}", log)
    answer = httpx.get(f"{guarded.url}/admin/workers", headers={"Authorization": f"Bearer {text}"})
    assert answer.status_code == 200


# --- the command ------------------------------------------------------------------------------------------------------


def keys_command(guarded, *arguments: str):
    return run_with("service", {"REDIS_URL": guarded.redis.url}, "keys", *arguments)


def test_keys_are_made_listed_and_revoked(guarded):
    made = keys_command(guarded, "add", "an app", "--scopes", "read,generate", "--max-jobs", "3")
    text = made.stdout.strip()
    assert re.fullmatch(r"fl_[0-9a-z]{8}_[\w-]{43}", text)
    key_id = text.split("_")[1]
    assert "whsec_" in made.stderr
    stored = Keys(connect(guarded.redis.url)).get(key_id)
    assert (stored.scopes, stored.max_jobs) == (("generate", "read"), 3)
    assert text.split("_", 2)[2] not in str(stored)
    listed = keys_command(guarded, "list").stdout
    assert f"{key_id}  " in listed and "an app" in listed and text not in listed
    headers = {"Authorization": f"Bearer {text}"}
    assert httpx.get(f"{guarded.url}/generate", headers=headers).status_code == 200
    assert keys_command(guarded, "revoke", key_id).returncode == 0
    wait_for(lambda: httpx.get(f"{guarded.url}/generate", headers=headers).status_code == 401, 5, "the end of the key")
    assert keys_command(guarded, "revoke", key_id).returncode == 2


def test_a_key_that_cannot_be_is_refused(guarded):
    assert "scope 'write': there are generate" in keys_command(guarded, "add", "x", "--scopes", "write").stderr
    store = Keys(connect(guarded.redis.url))
    for text in ("changeme", "", "fl_00000000_short", "fl_00000000_" + 43 * "a", "fl_0000000é_" + 43 * "a"):
        with pytest.raises(BadKey):
            store.add(text, "x", ("read",))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"AUTH": "off", "HOST": "0.0.0.0"}, "AUTH=off with HOST=0.0.0.0"),
        ({"HOST": "0.0.0.0", "ADMIN_KEY": "changeme"}, "ADMIN_KEY: this is no key"),
        ({"HOST": "0.0.0.0", "ADMIN_KEY": "fl_00000000_" + 43 * "a"}, "ADMIN_KEY: the key's secret is no random text"),
        ({"CORS_ORIGINS": "*"}, "CORS_ORIGINS"),
    ],
)
def test_no_start_with_a_secret_that_is_none(guarded, environment, said):
    ended = run_with("service", {"REDIS_URL": guarded.redis.url, **environment})
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "changeme" not in ended.stderr


# --- where none is needed ---------------------------------------------------------------------------------------------


def test_on_the_loopback_no_key_is_needed_and_any_word_will_do(client):
    for headers in ({}, {"Authorization": "Bearer unused"}, {"X-API-Key": "x"}):
        assert client.get("/generate", headers=headers).status_code == 200
    unknown = {"Authorization": f"Bearer {new_key()}"}  # meant to be one, and is not
    assert client.get("/generate", headers=unknown).status_code == 401


def test_other_sites_stay_outside(client, stack):
    assert client.get("/generate", headers={"Host": "evil.example"}).json()["error"]["code"] == "other_site"
    assert client.get("/livez", headers={"Host": f"localhost:{stack.port}"}).status_code == 200
    other = {"Origin": "https://evil.example"}
    assert client.post("/admin/queue/resume", headers=other).json()["error"]["code"] == "other_site"
    same = {"Origin": f"http://127.0.0.1:{stack.port}"}
    assert client.post("/admin/queue/resume", headers=same).status_code == 200
    assert "access-control-allow-origin" not in client.get("/generate", headers=other).headers
