"""Logging in with the API token: `/auth/`, which 3D Slicer's module calls, and `/login` for browsers."""

from __future__ import annotations

import re
from html import escape
from typing import Annotated, Any

import requests
from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.security import OAuth2PasswordRequestForm
from monailabel.endpoints import login as stock

from apps.samloop.buckets import client_key
from apps.samloop.identity import CURRENT, RefusedError, TokenDoor
from apps.samloop.page import STYLE
from sam_infer.errors import InputError, UnavailableError

#: Where a token is asked for.
router = APIRouter(tags=["Auth"])
#: Where OpenID is; the rest is stock's.
openid = APIRouter(tags=["Auth"])
#: A path of this server: "//" and "/\" would lead a browser to another.
_LOCAL = re.compile(r"/(?![/\\])[!-\[\]-~]*")


@router.get("/auth/")
async def enabled() -> dict[str, Any]:
    """That users log in, as 3D Slicer asks before each request."""
    return {"enabled": True, "client_id": "samloop", "realm": ""}


@router.post("/auth/token")
async def token(
    request: Request, username: Annotated[str, Form()] = "", password: Annotated[str, Form()] = ""
) -> Response:
    """A token that carries a name, for any ``username`` with the server's token as ``password``.

    It is good for half a day; labels that are accepted with it say who accepted them.
    """
    try:
        issued = _door(request).exchange(username, password, client_key(request.scope.get("client")))
    except RefusedError as refused:
        return JSONResponse({"detail": refused.detail}, refused.status, refused.headers)
    return JSONResponse({"access_token": issued, "token_type": "bearer"})


@router.get("/auth/token/valid")
async def valid() -> dict[str, Any]:
    """Who the token is of."""
    return CURRENT.get().model_dump()


@router.get("/login", include_in_schema=False)
async def login_page(next: str = "/") -> HTMLResponse:
    """A form that works without internet and without scripts."""
    return HTMLResponse(_page(next))


@router.post("/login", include_in_schema=False)
async def login(
    request: Request,
    username: Annotated[str, Form()] = "",
    password: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "/",
) -> Response:
    """Set the cookie that lets a browser in, and go where it wanted to."""
    door = _door(request)
    try:
        issued = door.exchange(username, password, client_key(request.scope.get("client")))
    except RefusedError as refused:
        return HTMLResponse(_page(next, refused.detail), refused.status, refused.headers)
    except InputError as error:
        return HTMLResponse(_page(next, str(error)), error.status)
    answer = RedirectResponse(next if _LOCAL.fullmatch(next) else "/", 303)
    answer.set_cookie(**door.set_cookie(issued, secure=request.url.scheme == "https"))
    return answer


@router.post("/logout", include_in_schema=False)
async def logout(request: Request) -> Response:
    """Take the cookie back."""
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(_door(request).cookie, httponly=True, samesite="strict")
    return answer


@openid.post("/auth/token")
def openid_token(username: Annotated[str, Form()], password: Annotated[str, Form()]) -> Any:
    """A token of the OpenID realm, for a user's name and password there."""
    form = OAuth2PasswordRequestForm(username=username, password=password)
    coroutine = stock.access_token(form)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    except requests.HTTPError as error:
        status = error.response.status_code
        if status >= 500:
            raise UnavailableError("the OpenID realm", f"HTTP {status}", "look after it") from None
        return JSONResponse({"detail": "the realm does not know this name and password"}, 401)
    except requests.RequestException as error:
        raise UnavailableError("the OpenID realm", repr(error), "look after it") from None
    raise RuntimeError("stock's access_token awaits by now")


def _door(request: Request) -> TokenDoor:
    door: TokenDoor = request.app.state.door
    return door


def _page(next: str, error: str = "") -> str:
    told = f'<p role="alert"><strong>{escape(error)}</strong></p>' if error else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Log in</title><style>{STYLE}</style>'
        f'<h1>Log in</h1>{told}<form method="post" action="/login">'
        '<p><label>Your name<br><input name="username" required maxlength="64" autocomplete="username" '
        'autofocus></label></p><p><label>Token of this server<br><input name="password" type="password" '
        'required autocomplete="current-password"></label></p>'
        f'<input type="hidden" name="next" value="{escape(next)}"><button>Log in</button></form>'
        "<p>Labels that you accept are stored with your name.</p></html>"
    )
