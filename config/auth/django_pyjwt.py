"""A Django view that makes the token of the user who is logged in. Needs PyJWT.

In ``urls.py``: ``path("realtime-token", django_pyjwt.realtime_token)``. In the browser:
``pb.authStore.save((await (await fetch("/realtime-token")).json()).token)``.
"""

import time

import jwt
from django.conf import settings
from django.http import HttpRequest, JsonResponse


def realtime_token(request: HttpRequest) -> JsonResponse:
    """Return a token for ten minutes, after which the connection ends and asks for the next."""
    if not request.user.is_authenticated:
        return JsonResponse({}, status=401)
    claims = {"sub": str(request.user.pk), "exp": int(time.time()) + 600}
    return JsonResponse({"token": jwt.encode(claims, settings.REALTIME_SECRET, algorithm="HS256")})
