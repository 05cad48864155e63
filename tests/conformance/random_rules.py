"""Random rules with every construct, meaningful or not; over the corpus' collections by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

FIELDS = {
    "posts": (
        "id title slug views rating published pub_date data data.a data.b data.s data.0 data.tags"
        " data.list.0 status tags author reviewers team related loc loc.lon loc.lat internal"
    ),
    "users": (
        "id name nick role level active joined prefs prefs.n prefs.theme prefs.langs team groups"
        " manager badges pin email verified emailVisibility"
    ),
    "teams": (
        "id name country budget open founded tags meta meta.size meta.0 hq hq.lon lead members"
        " parent"
    ),
    "comments": "id post author body score approved likes about",
    "profiles": "id user bio points",
}

RELATIONS = {
    "posts": {
        "author": "users",
        "reviewers": "users",
        "team": "teams",
        "related": "posts",
        "comments_via_post": "comments",
        "comments_via_about": "comments",
        "posts_via_related": "posts",
    },
    "users": {
        "team": "teams",
        "groups": "teams",
        "manager": "users",
        "posts_via_author": "posts",
        "posts_via_reviewers": "posts",
        "profiles_via_user": "profiles",
        "comments_via_likes": "comments",
    },
    "teams": {
        "lead": "users",
        "members": "users",
        "parent": "teams",
        "posts_via_team": "posts",
        "users_via_groups": "users",
    },
    "comments": {"post": "posts", "author": "users", "likes": "users", "about": "posts"},
    "profiles": {"user": "users"},
}

_MODIFIERS = ("",) * 12 + (":lower", ":length", ":each", ":each", ":isset")
_TEXTS = (
    "'' 'a' '5' '5.0' '1' '0' 'true' 'Bob' 'ubob' 'uann' 'tred' 'hello' 'HELLO' '%' 'h%' 'a_b' '_'"
    r" 'x%y_z\\' '\\' '%\\' '[]' '[\"news\"]' 'news' '2024' 'é' 'é%' '10' '1e1' '-1' 'null' 'dark'"
    " 'Red' '10.0'"
)
TEXTS = (*_TEXTS.split(), "' 5 '", "'2024-01-01 00:00:00.000Z'")
NUMBERS = [
    "5",
    "5.0",
    "0",
    "1",
    "-1",
    "10",
    "0.5",
    "2.5",
    "99.5",
    "0.30000000000000004",
    "1000000",
    "-0",
    "10000000000",
    "0.1",
    "3",
]
LITERALS = (
    *(*TEXTS, *NUMBERS),
    *("'2024'", "'2024.0'", "' 2024'", "'2024 '", "'+2024'", "'02024'", "'2.024e3'", "'2024.'"),
    *("'20240'", "'2023'", "'-2024'", "'0x7e8'", "'2_024'", "'2024a'", "'\u0662'", "'2024-03-10'"),
    *("'1710028800'", "'1710028800.0'", "'12'", "'12.0'", "'1.2e1'", "'03'", "'3'", "'3.0'"),
    *("'0'", "'0.0'", "'-0'", "'00'", "'1e999'", "'-1e999'", "'1e-999'", "'Infinity'", "'NaN'"),
    *("2024", "2024.0", "-2024", "1710028800", "12", "3", "9007199254740993", "0.5", "-0.0"),
    *("'9007199254740993'", "'9007199254740993.0'", "'9223372036854775808'", "'%20%'", "'2_24'"),
)
"""Texts that look like numbers or nearly do, and numbers of every spelling."""
_REQUEST = (
    "id name email team groups groups.name groups:each verified level team.name prefs.theme"
    " badges:length nope id:lower posts_via_author.title joined"
)
REQUEST = (
    *(f"@request.auth.{path}" for path in _REQUEST.split()),
    *("@request.query.q", "@request.query.q:lower", "@request.query.views", "@request.query.nope"),
    *("@request.query.q:isset", "@request.method", "@request.body.title"),
    *("@request.body.title:lower", "@request.body.tags:length", "@request.body.tags:each"),
    "@request.body.title:changed",
)
WORDS = ["null", "true", "false", "True", "@year", "@month", "@todayStart", "@weekday"]
FORMATS = (
    *("%Y", "%Y-%m-%d", "%d", "%H:%M:%f", "%j", "%w", "%u", "%W-%U", "%G-%V", "x%%y", "%s", "%e"),
    *("%k|%l %p%P", "%I", "%T", "%R", "%F", "%q", "", "%Y%", "%g"),
)
SHIFTS = (
    *("+1 day", "-1 month", "+1 month", "+1.5 hours", "start of month", "start of year"),
    *("start of day", "weekday 0", "weekday 3", "unixepoch", "auto", "julianday", "+90 minutes"),
    *("-2 years", "bogus", "subsec", "ceiling", "+10 seconds", "1 days", "+5000 years"),
)
OPERATORS = ["=", "!=", "=", "!=", ">", ">=", "<", "<=", "~", "!~"]
TOKENS = (
    *("views", "title", "5", "-1", "-.5", "1.", "007", "'a'", '"b"', "'it\\'s'", "'a\\\\'", "=1"),
    *("&&", "||", "(", ")", "(", ")", " ", "\n", "//c\n", "// it's\n", "//)\n", "//(", "true"),
    *("strftime(", "strftime('%Y', pub_date)", "geoDistance(1,2,3,4)", ",", "@request.auth.id"),
    *("data.a", "tags:each", "title:", "a.", "_", "#a", "@", "\r", "\u00a0", "=", "==", "&", "|"),
    *("/", "views=5", "(views=5)", "published = true", "id ~ 1", "1=1", "\\", "'", '"', "é", "-"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What rules about some collections are made of."""

    fields: Mapping[str, str]
    """By collection, its fields and paths into them, separated by blanks."""
    relations: Mapping[str, Mapping[str, str]]
    """By collection, its relations and back relations, and the collections that they lead to."""
    texts: tuple[str, ...]
    """Literals."""
    request: tuple[str, ...]
    """Paths below ``@request``."""


CORPUS_VOCABULARY = Vocabulary(fields=FIELDS, relations=RELATIONS, texts=TEXTS, request=REQUEST)


class RandomRules:
    """Makes rules, filters and near-rules from a seed."""

    def __init__(self, seed: int, vocabulary: Vocabulary = CORPUS_VOCABULARY) -> None:
        self._random = Random(seed)
        self._vocabulary = vocabulary

    def pick(self, *choices: object) -> str:
        """Return one of the choices."""
        return str(self._random.choice(choices))

    def query(self) -> dict[str, str]:
        """Return the parameters of a request."""
        if self._random.random() < 0.5:
            return {}
        return {
            "q": self.pick("", "5", "Hello", "a_b", "h%", "\\", "now", "2024"),
            "views": self.pick("5", "x", "", "2.50"),
        }

    def rule(self, collection: str, depth: int = 2, *, is_filter: bool = False) -> str:
        """Return a rule about a row of the collection; a filter names no request."""
        chance = self._random.random()
        if depth == 0 or chance < 0.55:
            return self._comparison(collection, is_filter=is_filter)
        if chance < 0.92:
            parts = [self.rule(collection, depth - 1, is_filter=is_filter) for _ in range(2)]
            return self.pick(" && ", " || ").join(parts)
        return f"({self.rule(collection, depth - 1, is_filter=is_filter)})"

    def function_rule(self, collection: str, *, is_filter: bool = False) -> str:
        """Return a comparison of a function's result, or of a modifier's, with any literal."""
        left = self._result(collection)
        right = self.pick(*LITERALS) if self._random.random() < 0.75 else self._result(collection)
        if not is_filter and self._random.random() < 0.1:
            right = self.pick(*self._vocabulary.request, *WORDS)
        if self._random.random() < 0.4:
            left, right = right, left
        return f"{left} {self.pick('', '', '?')}{self.pick(*OPERATORS)} {right}"

    def _result(self, collection: str) -> str:
        if self._random.random() < 0.7:
            return self._call(collection)
        names = self._vocabulary.fields[collection].split()
        return self.pick(*names) + self.pick(":lower", ":length", ":each", "")

    def near_rule(self) -> str:
        """Return a text at the edge of the language, valid or not."""
        if self._random.random() < 0.5:
            words = [self.pick(*TOKENS) + self.pick("", " ") for _ in range(self._upto(8))]
            return "".join(words)
        text = list(
            self.pick(
                "views = 5",
                "(views = 5 && title = 'a') || published = true",
                "strftime('%Y', pub_date) = '2024' && (id = 'p01' || (views > 3))",
                "title ~ 'h' // c\n && views > 1",
                "data.a = 1 || (tags:each ?= 'news')",
            )
        )
        for _ in range(self._upto(2)):
            at = self._random.randrange(len(text))
            text[at : at + self._upto(2) - 1] = [self.pick(*TOKENS, *"()=&|'\"/ \n!?~<>.:,-\\")]
        return "".join(text)

    def _upto(self, most: int) -> int:
        return self._random.randint(1, most)

    def _comparison(self, collection: str, *, is_filter: bool) -> str:
        if self._random.random() < 0.3:
            left, right = self.path(collection), self.pick(*self._vocabulary.texts, *NUMBERS)
        else:
            left, right = (self._operand(collection, is_filter=is_filter) for _ in range(2))
        return f"{left} {self.pick('', '', '?')}{self.pick(*OPERATORS)} {right}"

    def _operand(self, collection: str, *, is_filter: bool) -> str:
        chance = self._random.random()
        if chance < 0.50:
            return self.path(collection)
        if chance < 0.68:
            return self.pick(*self._vocabulary.texts)
        if chance < 0.76:
            return self.pick(*NUMBERS)
        if chance < 0.81:
            return self.pick(*WORDS)
        if chance < 0.86:
            return self._call(collection)
        if is_filter:
            return self.path(collection)
        if chance < 0.95:
            return self.pick(*self._vocabulary.request)
        other = self.pick(*self._vocabulary.fields)
        return f"@collection.{other}{self.pick('', f':x{other}')}.{self.path(other, 1)}"

    def path(self, collection: str, depth: int = 2) -> str:
        """Return a path to a field, with a modifier or without."""
        relations = self._vocabulary.relations[collection]
        if depth and relations and self._random.random() < 0.45:
            relation = self.pick(*relations)
            return f"{relation}.{self.path(relations[relation], depth - 1)}"
        return self.pick(*self._vocabulary.fields[collection].split()) + self.pick(*_MODIFIERS)

    def _call(self, collection: str) -> str:
        if self._random.random() < 0.5:
            points = (self.pick(self.path(collection, 1), *NUMBERS[:5], "null") for _ in range(4))
            return f"geoDistance({', '.join(points)})"
        dates = ("'2024-02-30 12:00'", "'12:30'", "'2024-01-31T10:00:00.5+02:00'", "@todayStart")
        given = ("'now'", "'NOW'", "@request.query.q", "@request.query.views", "2460000.5")
        time = self.pick(
            self.path(collection), *dates, *self._vocabulary.texts[:4], *NUMBERS[:4], *given
        )
        shifts = (f", '{self.pick(*SHIFTS)}'" for _ in range(self._upto(3) - 1))
        if self._random.random() < 0.1:
            return f"strftime('{self.pick('%Y', '%Y-%m', '%F', '%j', '%%', '%q')}')"
        return f"strftime('{self.pick(*FORMATS)}', {time}{''.join(shifts)})"
