"""Who sent a request: by API token, or by MONAI Label's OpenID."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from contextvars import ContextVar
from typing import Any, Protocol

import jwt
import requests
from anyio import to_thread
from monailabel.config import settings
from monailabel.endpoints.user import auth
from monailabel.endpoints.user.auth import DEFAULT_USER, User
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from apps.samloop.buckets import Buckets
from apps.samloop.tokens import ISSUED, LIFETIME, ApiToken, check_name
from sam_infer.errors import UnavailableError

#: Who sent the request that is being answered; without token or OpenID everybody is this user, as in stock.
CURRENT: ContextVar[User] = ContextVar("user", default=DEFAULT_USER)
#: The name of a client that sends the API token itself.
API_USER = "api"
#: Wrong tokens that an address may send at once, and further ones per minute.
WRONG_TOKENS = 10
#: Tokens that worked, remembered by address: they go on working while others are guessed from there.
_REMEMBERED = 1024
#: Signatures of OpenID tokens that are accepted: by the realm's key, which is public.
_ALGORITHMS = ["RS256", "RS384", "RS512"]


class RefusedError(Exception):
    """Nobody is let in with this.

    Args:
        detail: Why, for the client.
        status: 401, or 429 where too many wrong tokens came before.
        wait: Seconds after which to try again; 0 = at once.
    """

    def __init__(self, detail: str, *, status: int = 401, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.wait = wait

    @property
    def headers(self) -> dict[str, str]:
        """What the refusal says beside its text."""
        if self.status == 429:
            return {"retry-after": str(int(self.wait) + 1)}
        return {"www-authenticate": "Bearer"}


class Authenticator(Protocol):
    """Tells who sent a request."""

    async def user(self, headers: Headers, client: str) -> User:
        """Who sent it.

        Args:
            headers: The request's.
            client: Stands for its address.

        Raises:
            RefusedError: When they do not say, or it is not true.
            UnavailableError: When that cannot be told now.
        """
        ...


class TokenDoor:
    """Lets in who has the API token, or one that was issued for it: in a header, or in a browser's cookie.

    Args:
        token: The API token.
        cookie: Name of the cookie.
    """

    def __init__(self, token: ApiToken, *, cookie: str) -> None:
        self._token = token
        self.cookie = cookie
        self._wrong = Buckets(per_minute=WRONG_TOKENS, burst=WRONG_TOKENS)
        self._known: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    async def user(self, headers: Headers, client: str) -> User:
        """See `Authenticator`."""
        sent = [_bearer(headers), cookie_parser(headers.get("cookie", "")).get(self.cookie, "")]
        if not any(sent):
            raise RefusedError(
                "no token was sent; send Authorization: Bearer TOKEN, or open /login in a browser"
            )
        for credential in filter(None, sent):
            name = self._name(credential, client)
            if name is not None:
                return _everything(name)
        raise RefusedError("the token is wrong or no longer good; ask for one, or open /login in a browser")

    def exchange(self, name: str, password: str, client: str) -> str:
        """A token that carries a name, for the API token as password.

        Raises:
            RefusedError: When it is not the API token.
            InputError: When the name cannot be one.
        """
        if password.startswith(ISSUED) or self._name(password, client) is None:
            raise RefusedError("the password is not this server's token")
        if self._token.matches(name.strip()):
            raise RefusedError("the name is the token: send your own, since it is stored with labels")
        return self._token.issue(check_name(name))

    def set_cookie(self, issued: str, *, secure: bool) -> dict[str, Any]:
        """How `starlette.responses.Response.set_cookie` is to set the cookie that carries an issued token."""
        return {
            "key": self.cookie,
            "value": issued,
            "max_age": LIFETIME,
            "httponly": True,
            "samesite": "strict",
            "secure": secure,
        }

    def _name(self, credential: str, client: str) -> str | None:
        """Whose credential it is. Guesses at the API token are counted, and refused when there are many."""
        if credential.startswith(ISSUED):
            return self._token.name_of(credential)
        known = client, hashlib.sha256(credential.encode("utf-8", "replace")).digest()
        wait = self._wrong.wait(client)
        if wait and known not in self._known:
            raise RefusedError("too many wrong tokens came from this address", status=429, wait=wait)
        if not self._token.matches(credential):
            self._wrong.take(client)
            return None
        self._known[known] = None
        self._known.move_to_end(known)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return API_USER


class OpenId:
    """MONAI Label's OpenID, as its settings (``MONAI_LABEL_AUTH_*``) say.

    Stock cannot check a token with the library that it asks for: it does not say which signatures it accepts.
    """

    async def user(self, headers: Headers, client: str) -> User:
        """See `Authenticator`."""
        token = _bearer(headers)
        if not token:
            raise RefusedError("no token was sent; send Authorization: Bearer TOKEN")
        try:
            return await to_thread.run_sync(_claims, token)
        except jwt.InvalidTokenError as error:
            raise RefusedError(f"the token is not accepted: {error}") from None


def _claims(token: str) -> User:
    realm = settings.MONAI_LABEL_AUTH_REALM_URI
    try:
        key = auth.get_public_key(realm)
    except (requests.RequestException, KeyError) as error:
        remedy = "look after it, or correct MONAI_LABEL_AUTH_REALM_URI"
        raise UnavailableError(f"the OpenID realm {realm}", f"no key from it ({error!r})", remedy) from None
    payload = jwt.decode(token, key, algorithms=_ALGORITHMS, options={"verify_aud": False})
    roles: Any = payload
    for part in settings.MONAI_LABEL_AUTH_TOKEN_ROLES.split("#"):
        roles = roles.get(part) if isinstance(roles, dict) else None
    return User(
        username=payload.get(settings.MONAI_LABEL_AUTH_TOKEN_USERNAME) or payload.get("sub") or "",
        email=payload.get(settings.MONAI_LABEL_AUTH_TOKEN_EMAIL),
        name=payload.get(settings.MONAI_LABEL_AUTH_TOKEN_NAME),
        roles=roles if isinstance(roles, list) else [],
    )


def answer_current_user() -> None:
    """Have MONAI Label's routes take who was let in here for the user."""
    auth.from_token = lambda _: CURRENT.get()


def _bearer(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _everything(name: str) -> User:
    """Who has the token may do everything."""
    return User(username=name, name=name, roles=DEFAULT_USER.roles)
