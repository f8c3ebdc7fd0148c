"""`PUT /session/`: an image that is not to be stored, for as long as a session lasts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, File, HTTPException, UploadFile
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance

from apps.samloop.incoming import received
from sam_infer.errors import InputError

router = APIRouter(tags=["Session"])


@router.put("/session/")
def create(
    uncompress: bool = False,
    expiry: int = 0,
    files: list[UploadFile] = File(...),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> dict[str, Any]:
    """Upload one image file; answers with ``session_id``. ``expiry`` in seconds, 0 = the server's own."""
    sessions = app_instance().sessions()
    if sessions is None:
        raise HTTPException(406, "sessions are turned off on this server")
    if uncompress:
        raise InputError("uncompress", True, "archives are not unpacked; send the image file itself")
    if len(files) != 1:
        raise InputError("files", len(files), "send one image file, a volume or a picture")
    with received("files", files[0]) as path:
        session_id, session = sessions.add_session(str(path), expiry, uncompress=False)
    return {"session_id": session_id, "session_info": session.to_json()}
