"""`PUT /session/`: an image that is not to be stored, for as long as a session lasts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, File, HTTPException, UploadFile
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance

from apps.samloop.incoming import received
from apps.samloop.sessions import check_expiry, check_room
from sam_infer.errors import InputError

router = APIRouter(tags=["Session"])


@router.put("/session/")
def create(
    uncompress: bool = False,
    expiry: int = 0,
    files: list[UploadFile] = File(...),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> dict[str, Any]:
    """Upload one image file; answers with ``session_id``. It lasts ``expiry`` seconds after its last use.

    0 = as long as the server lets any session last, which is also the longest.
    """
    sessions = app_instance().sessions()
    if sessions is None:
        raise HTTPException(406, "sessions are turned off on this server")
    if uncompress:
        raise InputError("uncompress", True, "archives are not unpacked; send the image file itself")
    if len(files) != 1:
        raise InputError("files", len(files), "send one image file, a volume or a picture")
    expiry = check_expiry(expiry)
    check_room(sessions, files[0].size or 0)
    with received("files", files[0]) as path:
        session_id, session = sessions.add_session(str(path), expiry, uncompress=False)
    return {"session_id": session_id, "session_info": session.to_json()}
