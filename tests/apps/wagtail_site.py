"""A Wagtail site as its own program: makes its schema, and edits as its authors do.

    python wagtail_site.py migrate
    python wagtail_site.py edit SEED COUNT

``DATABASE_URL`` names the database. Wagtail is imported from the folder that ``PYTHONPATH`` names.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

import os
import sys
from random import Random
from urllib.parse import urlsplit

import django
from django.conf import settings
from django.core.management import call_command

_database = urlsplit(os.environ["DATABASE_URL"])
settings.configure(
    SECRET_KEY="made up for the tests",
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    ROOT_URLCONF=__name__,
    STATIC_URL="/static/",
    WAGTAIL_SITE_NAME="Test",
    WAGTAILADMIN_BASE_URL="http://localhost",
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    INSTALLED_APPS=[
        *("wagtail.contrib.forms", "wagtail.contrib.redirects", "wagtail.embeds"),
        *("wagtail.sites", "wagtail.users", "wagtail.snippets", "wagtail.documents"),
        *("wagtail.images", "wagtail.search", "wagtail.admin", "wagtail"),
        *("modelcluster", "taggit", "django.contrib.auth", "django.contrib.contenttypes"),
        *("django.contrib.sessions", "django.contrib.messages", "django.contrib.admin"),
    ],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": _database.hostname,
            "PORT": _database.port,
            "USER": _database.username,
            "PASSWORD": _database.password or "",
            "NAME": _database.path.removeprefix("/"),
        }
    },
)
django.setup()

# Models can't be imported before.
from django.contrib.auth.models import Group, User  # noqa: E402
from wagtail.contrib.redirects.models import Redirect  # noqa: E402
from wagtail.models import Collection, Comment, Page  # noqa: E402

urlpatterns: list[object] = []
LAST_PATH = "/the-end"
"""Of the redirect that is created last."""


class Editor:
    """Carries out random operations of authors, each in transactions of its own."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)
        self._number = 0

    def edit(self, count: int) -> None:
        """Carry out ``count`` operations."""
        operations = [
            *([self.create_page] * 4 + [self.revise_page] * 5 + [self.publish_page] * 3),
            *(self.move_page, self.delete_page, self.unpublish_page),
            *([self.create_user] * 2 + [self.change_groups] * 3 + [self.delete_user]),
            *(self.comment, self.redirect, self.change_collection),
        ]
        for _ in range(count):
            self._chance.choice(operations)()

    def _name(self) -> str:
        self._number += 1
        letters = self._chance.choice(
            ["plain", "Größe", "日本", "it's", 'a "quote"', "back\\slash"]
        )
        return f"{letters} {self._number}"

    def _page(self) -> Page | None:
        """Return a page that is neither the root nor the site's home."""
        pages = list(Page.objects.filter(depth__gt=2))
        return self._chance.choice(pages) if pages else None

    def create_page(self) -> None:
        parent = self._page() if self._chance.random() < 0.4 else None
        home = Page.objects.filter(depth=2).first()
        name = self._name()
        live, slug = self._chance.random() < 0.5, f"page-{self._number}"
        page = Page(title=name, slug=slug, live=live, owner=self._user())
        (parent or home).add_child(instance=page)

    def revise_page(self) -> None:
        if (page := self._page()) is not None:
            page.title = self._name()
            page.save_revision(user=self._user())

    def publish_page(self) -> None:
        page = self._page()
        if page is not None and page.get_latest_revision() is not None:
            page.get_latest_revision().publish()

    def unpublish_page(self) -> None:
        if (page := self._page()) is not None:
            page.unpublish()

    def move_page(self) -> None:
        page, target = self._page(), self._page()
        if page and target and target != page and not target.is_descendant_of(page):
            page.move(target, pos="last-child")

    def delete_page(self) -> None:
        if (page := self._page()) is not None:
            page.delete()

    def _user(self) -> User | None:
        users = list(User.objects.all())
        return self._chance.choice(users) if users else None

    def create_user(self) -> None:
        name = self._name()
        User.objects.create_user(f"user{self._number}", f"{self._number}@example.com", name)

    def change_groups(self) -> None:
        if (user := self._user()) is not None:
            groups = list(Group.objects.all())
            user.groups.set(self._chance.sample(groups, self._chance.randint(0, len(groups))))

    def delete_user(self) -> None:
        if (user := self._user()) is not None and user.username != "ann":
            user.delete()

    def comment(self) -> None:
        page, user = self._page(), self._user()
        if page and user:
            Comment.objects.create(page=page, user=user, text=self._name(), contentpath="title")

    def redirect(self) -> None:
        if self._chance.random() < 0.3:
            Redirect.objects.order_by("?").delete()
        else:
            self._number += 1
            Redirect.objects.create(old_path=f"/old-{self._number}", redirect_page=self._page())

    def change_collection(self) -> None:
        root = Collection.get_first_root_node()
        if self._chance.random() < 0.3 and (last := root.get_children().last()) is not None:
            last.delete()
        else:
            root.add_child(name=self._name())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["migrate"]:
            call_command("migrate", verbosity=0)
            User.objects.create_user("ann", "ann@example.com")
        case ["edit", seed, count]:
            Editor(int(seed)).edit(int(count))
            Redirect.objects.create(old_path=LAST_PATH)
        case _:
            sys.exit(__doc__)
