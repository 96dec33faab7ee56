"""Fetching an input image from a URL that a client has given."""

from __future__ import annotations

import asyncio

import httpx

from service.errors import ApiError
from service.guard import Blocked

MAX_REDIRECTS = 3
MAX_URL = 8192
"""Characters; a signed link of an object store has up to a few thousand."""


async def fetch_image(client: httpx.AsyncClient, url: str, max_bytes: int, deadline_s: float) -> bytes:
    """The bytes at ``url``; what they are is for others to judge.

    Args:
        client: as ``guard.guarded_client`` makes it: it judges every address, those of redirects among them.
        url: from the client, unchecked.
        max_bytes: more are not read.
        deadline_s: for the whole, redirects and all.

    Raises:
        ApiError: 422; nothing of what was received is in it.
    """
    if len(url) > MAX_URL:
        raise _failed(f"the URL has {len(url)} characters; at most {MAX_URL} are taken")
    try:
        async with asyncio.timeout(deadline_s):
            return await _follow(client, url, max_bytes)
    except Blocked as error:
        raise ApiError(422, "image_url_blocked", f"image: {error}", param="image") from None
    except httpx.InvalidURL as error:
        raise _failed(f"this is no URL ({error}); wanted https://...") from None
    except httpx.TooManyRedirects:
        raise _failed(f"the URL redirects more than {MAX_REDIRECTS} times; give the one at the end") from None
    except (TimeoutError, httpx.TimeoutException):
        raise _failed(f"the URL did not give the whole image in time (within {deadline_s:g} s)") from None
    except httpx.ConnectError:
        raise _failed("the URL's host cannot be connected to; check its name and, for https, its certificate") from None
    except httpx.TransportError as error:
        raise _failed(f"the URL's host broke off, or does not speak HTTP ({type(error).__name__})") from None


async def _follow(client: httpx.AsyncClient, url: str, max_bytes: int) -> bytes:
    request = client.build_request("GET", url)
    for _ in range(1 + MAX_REDIRECTS):
        response = await client.send(request, stream=True)
        try:
            if response.next_request is None:
                return await _read(response, max_bytes)
            request = response.next_request
        finally:
            await response.aclose()
    raise httpx.TooManyRedirects("", request=request)


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    if response.status_code != httpx.codes.OK:
        raise _failed(f"the URL answered with status {response.status_code}; wanted 200 and the image")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        # A few bytes can unpack to any number, and no picture gains by it.
        raise _failed("the URL answered with a compressed body, which was not asked for; serve the image as it is")
    announced = response.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced[:18]) > max_bytes:
        raise _too_large(max_bytes)
    received = bytearray()
    async for part in response.aiter_raw():
        received += part
        if len(received) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(received)


def _failed(message: str) -> ApiError:
    return ApiError(422, "image_url_failed", f"image: {message}", param="image")


def _too_large(max_bytes: int) -> ApiError:
    message = f"image: what the URL gives is larger than {max_bytes} bytes; scale the image down"
    return ApiError(422, "image_url_too_large", message, param="image")
