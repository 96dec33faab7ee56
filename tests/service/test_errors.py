"""What nobody expected is still answered in the envelope, with an id that finds it in the log."""

import asyncio

import httpx

from service.app import create_app
from service.settings import Settings


def test_an_unexpected_error_is_an_envelope_with_its_id_in_the_log(tmp_path, caplog):
    app = create_app(Settings(storage_url=str(tmp_path)))  # its lifespan has not run: every route that needs it breaks

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/models", headers={"X-Request-Id": "mine-1"})

    answer = asyncio.run(get())
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["error"]["code"] == "internal_error"
    assert "mine-1" in answer.json()["error"]["message"]
    assert "mine-1: GET /models" in caplog.text
    assert "Traceback" not in answer.text
