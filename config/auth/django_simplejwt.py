"""A Django view that makes an access token of djangorestframework-simplejwt.

Applications that log in by simplejwt have this token already and need no view: give it to the SDK
(``pb.authStore.save(access)``). This one is for those whose users have a session.
"""

from django.http import HttpRequest, JsonResponse
from rest_framework_simplejwt.tokens import AccessToken


def realtime_token(request: HttpRequest) -> JsonResponse:
    """Return the token of the user who is logged in; it lives for ``ACCESS_TOKEN_LIFETIME``."""
    if not request.user.is_authenticated:
        return JsonResponse({}, status=401)
    return JsonResponse({"token": str(AccessToken.for_user(request.user))})
