"""A schema with every kind of table, and statements on it, for tests of the stream."""

from __future__ import annotations

import random
from collections.abc import Callable

SCHEMA = """
CREATE TYPE mood AS ENUM ('sad', 'it''s "ok"');
CREATE TYPE pair AS (x int, y text);
CREATE DOMAIN truth AS boolean;
CREATE DOMAIN octets AS bytea;
CREATE DOMAIN few AS int CHECK (VALUE < 100);
CREATE TABLE types (
  id int PRIMARY KEY, b bool, i2 int2, i4 int4, i8 int8, n numeric, n2 numeric(30,10), f4 float4,
  f8 float8, m money, t text, v varchar(20), c char(5), q "char", nm name, by bytea, d date,
  ti time, tz timetz, ts timestamp, tstz timestamptz, iv interval, u uuid, j json, jb jsonb,
  x xml, inet inet, cidr cidr, mac macaddr, bits bit(3), vb varbit, p point, bx box, o oid,
  r int4range, mr datemultirange, tsv tsvector, lsn pg_lsn, e mood, pr pair, tr truth, oc octets,
  fw few, ia int[], ta text[], ba bool[], bya bytea[], ja jsonb[], ea mood[], pa pair[], trn truth[]
);
CREATE TABLE by_default (id int PRIMARY KEY, small text, big text);
CREATE TABLE by_whole_row (id int PRIMARY KEY, small text, big text, flag bool, raw bytea);
ALTER TABLE by_whole_row REPLICA IDENTITY FULL;
CREATE TABLE by_index (a int, b text NOT NULL, c text, d bool NOT NULL);
CREATE UNIQUE INDEX by_index_key ON by_index (b, d);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_key;
CREATE TABLE no_key (a int, b text);
ALTER TABLE no_key REPLICA IDENTITY FULL;
CREATE TABLE wide_key (k text PRIMARY KEY, n int);
CREATE TABLE generated (
  id int PRIMARY KEY, doubled int GENERATED ALWAYS AS (id * 2) STORED, t text
);
CREATE TABLE parts (id int, place int, t text, PRIMARY KEY (id, place)) PARTITION BY LIST (place);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
CREATE TABLE parts_2 (t text, dropped int, place int NOT NULL, id int NOT NULL);
ALTER TABLE parts_2 DROP COLUMN dropped;
ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES IN (2);
CREATE TABLE parts_3 PARTITION OF parts FOR VALUES IN (3, 4) PARTITION BY LIST (place);
CREATE TABLE parts_3_3 PARTITION OF parts_3 FOR VALUES IN (3);
CREATE TABLE parts_3_4 PARTITION OF parts_3 FOR VALUES IN (4);
ALTER TABLE parts_3_4 REPLICA IDENTITY FULL;
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (
  id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE,
  other int REFERENCES parent ON DELETE SET NULL
);
CREATE TABLE "We.ird, ""T'\\*" ("K k" int PRIMARY KEY, "a""b" text, "c\\d" text, "é{}" text);
CREATE TABLE "UPPER" ("Id" int PRIMARY KEY, "select" text);
CREATE TABLE other_table (id int PRIMARY KEY);
CREATE SCHEMA elsewhere;
CREATE TABLE elsewhere.unseen (id int PRIMARY KEY);
"""

BIG = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 400) i)"
"""12,800 characters that don't compress: a TOASTed value."""

TYPES = r"""
INSERT INTO types (id) VALUES (0);
INSERT INTO types VALUES (1, true, -32768, 2147483647, 9223372036854775807, 12.50,
  12345678901234567890.0123456789, 'NaN', 'Infinity', 1.20, E'q"\\\n\t\u0001\u2028é😀', 'v', 'c',
  'q', 'name', '\x00ff5c22', 'infinity', '23:59:59.999999', '12:00+02', '2020-01-01 01:02:03.004',
  '2020-06-01 00:00:00.123456+14', '1 year 2 mons -3 days 04:05:06.7', gen_random_uuid(),
  '{"a": [1, 2.50, "\u0041"], "a": null}', '{"b": 1.00}', '<a/>', '10.0.0.1/8', '10.0.0.0/8',
  '08:00:2b:01:02:03', '101', '1', '(1.5,-2)', '(1,1),(0,0)', 4000000000, '[1,5)',
  '{[2020-01-01,2020-02-01)}', 'a:1 fat', '16/B374D848', 'it''s "ok"', '(1,"a,b")', true, '\xdead',
  7, '{1,NULL,3}', '{"a b",NULL,"NULL","x\"y"}', '{t,f,NULL}', '{"\\xde","\\x"}', '{"{\"a\": 1}"}',
  '{sad}', '{"(1,x)"}', '{t}');
INSERT INTO types (id, b, n, f4, f8, d, tstz, iv, by, t, tr, oc, j) VALUES (2, false, 'NaN', 1e-30,
  -0.0, '0044-03-15 BC', '-infinity', 'P-1Y', '', '', false, '', 'null');
INSERT INTO types (id, n, f8, f4, i8, ts) VALUES (3, 'Infinity', 0.1, 3.4e38, -1, '294276-12-31'),
  (4, 1e100, 1e300, '-Infinity', 0, 'epoch'), (5, 0.000, 5e-324, 'NaN', 1, '1999-12-31 23:59:59');
UPDATE types SET b = NOT b, m = '-1.00', by = by || '\x01';
DELETE FROM types WHERE id > 1;
"""

IDENTITIES = f"""
INSERT INTO by_default VALUES (1, 'a', {BIG}), (2, 'b', NULL), (3, NULL, '');
UPDATE by_default SET small = 'c' WHERE id = 1;
UPDATE by_default SET id = 10 WHERE id = 1;
UPDATE by_default SET id = 11, big = NULL WHERE id = 10;
BEGIN; UPDATE by_default SET id = 12 WHERE id = 11; UPDATE by_default SET id = 11 WHERE id = 12;
COMMIT;
DELETE FROM by_default;
INSERT INTO by_whole_row VALUES (1, 'a', {BIG}, true, '\\x00'), (2, NULL, NULL, NULL, NULL);
UPDATE by_whole_row SET small = 'b';
UPDATE by_whole_row SET id = id + 10;
BEGIN; UPDATE by_whole_row SET flag = false; UPDATE by_whole_row SET flag = NULL; COMMIT;
DELETE FROM by_whole_row;
INSERT INTO by_index VALUES (1, 'x', NULL, true), (2, 'y', 'c', false);
UPDATE by_index SET c = 'd';
UPDATE by_index SET d = NOT d;
DELETE FROM by_index;
INSERT INTO no_key VALUES (1, 'a'), (1, 'a'), (NULL, NULL);
UPDATE no_key SET b = 'c';
DELETE FROM no_key;
INSERT INTO wide_key SELECT string_agg(md5(i::text), ''), 1 FROM generate_series(1, 80) i;
UPDATE wide_key SET n = 2;
UPDATE wide_key SET k = k || 'x';
DELETE FROM wide_key;
INSERT INTO generated (id, t) VALUES (1, 'a'), (2, {BIG});
UPDATE generated SET id = id + 10;
UPDATE generated SET t = 'b' WHERE id = 11;
DELETE FROM generated;
"""

PARTITIONS = f"""
INSERT INTO parts VALUES (1, 1, 'a'), (2, 2, {BIG}), (3, 3, 'c'), (4, 4, 'd');
UPDATE parts SET t = 'x' WHERE id <> 2;
UPDATE parts SET place = 2 WHERE id = 1;
UPDATE parts SET place = place % 4 + 1;
BEGIN; UPDATE parts SET place = place % 4 + 1; UPDATE parts SET place = place % 4 + 1; COMMIT;
BEGIN; DELETE FROM parts WHERE id = 1; INSERT INTO parts VALUES (1, 1, 'again'); COMMIT;
UPDATE parts SET id = 40, place = place % 4 + 1 WHERE id = 4;
DELETE FROM parts WHERE id = 40;
TRUNCATE parts_1;
TRUNCATE parts, other_table;
"""

TRANSACTIONS = r"""
INSERT INTO parent SELECT generate_series(1, 3);
INSERT INTO child VALUES (1, 1, 2), (2, 1, 3), (3, 3, 1);
DELETE FROM parent WHERE id = 1;
TRUNCATE parent CASCADE;
BEGIN; INSERT INTO other_table VALUES (1); ROLLBACK;
BEGIN; INSERT INTO other_table VALUES (2); SAVEPOINT s; INSERT INTO other_table VALUES (3);
ROLLBACK TO s; INSERT INTO other_table VALUES (4); SAVEPOINT t; INSERT INTO other_table VALUES (5);
RELEASE t; COMMIT;
BEGIN; INSERT INTO other_table VALUES (6); DELETE FROM other_table WHERE id = 6; COMMIT;
BEGIN; TRUNCATE other_table; INSERT INTO other_table VALUES (7);
TRUNCATE other_table, child; COMMIT;
INSERT INTO other_table VALUES (8) ON CONFLICT (id) DO UPDATE SET id = 9;
INSERT INTO other_table VALUES (8) ON CONFLICT (id) DO UPDATE SET id = 9;
INSERT INTO other_table VALUES (9) ON CONFLICT DO NOTHING;
MERGE INTO other_table o USING (VALUES (9), (10)) v(id) ON o.id = v.id
  WHEN MATCHED THEN UPDATE SET id = 90 WHEN NOT MATCHED THEN INSERT VALUES (v.id);
UPDATE other_table SET id = id;
INSERT INTO elsewhere.unseen VALUES (1);
SELECT pg_logical_emit_message(true, 'other', 'x'), pg_logical_emit_message(false, 'other', 'x');
INSERT INTO "We.ird, ""T'\*" VALUES (1, 'a', 'b', 'ü'), (2, NULL, '', '"');
UPDATE "We.ird, ""T'\*" SET "K k" = 3 WHERE "K k" = 1;
DELETE FROM "We.ird, ""T'\*";
INSERT INTO "UPPER" VALUES (1, 'x'); DELETE FROM "UPPER";
COPY other_table FROM PROGRAM 'seq 100 104';
BEGIN; ALTER TABLE other_table ADD COLUMN late text DEFAULT 'd';
INSERT INTO other_table VALUES (200); ALTER TABLE other_table ALTER COLUMN late DROP DEFAULT;
ALTER TABLE other_table ALTER COLUMN late TYPE bytea USING NULL;
UPDATE other_table SET late = '\x01' WHERE id = 200; COMMIT;
ALTER TABLE other_table DROP COLUMN late;
DELETE FROM other_table;
"""


def _random_workload(seed: int) -> str:
    """Return statements that each may match rows or none, in transactions that commit or don't."""
    chance = random.Random(seed)
    makers: list[Callable[[int], str]] = [
        lambda i: f"INSERT INTO by_default VALUES ({i}, '{i}', {BIG}) ON CONFLICT DO NOTHING",
        lambda i: f"UPDATE by_default SET small = small || '{i}' WHERE id % 3 = {i % 3}",
        lambda i: f"UPDATE by_default SET id = id + 1000 WHERE id = {i}",
        lambda i: (
            f"INSERT INTO by_whole_row VALUES ({i}, NULL, {BIG}, NULL, NULL)"
            " ON CONFLICT (id) DO UPDATE SET flag = true"
        ),
        lambda i: f"DELETE FROM by_whole_row WHERE id = {i}",
        lambda i: f"INSERT INTO parts VALUES ({i}, {i % 4 + 1}, 'p') ON CONFLICT DO NOTHING",
        lambda i: f"UPDATE parts SET place = (place + {i}) % 4 + 1 WHERE id % 5 = {i % 5}",
        lambda i: f"DELETE FROM parts WHERE id = {i}",
        lambda i: f"DELETE FROM by_default WHERE id = {i}",
        lambda i: (
            "TRUNCATE parts" if i == 7 else "TRUNCATE parts_2, no_key" if i == 8 else "SELECT"
        ),
        lambda i: f"INSERT INTO no_key VALUES ({i}, 'n'); UPDATE no_key SET b = 'm' WHERE a = {i}",
    ]
    lines: list[str] = []
    for number in range(60):
        body = "; ".join(
            f"SAVEPOINT s; {chance.choice(makers)(chance.randrange(20))};"
            f" {'ROLLBACK TO' if chance.random() < 0.2 else 'RELEASE'} s"
            for _ in range(chance.randrange(1, 6))
        )
        end = "ROLLBACK" if chance.random() < 0.1 else "COMMIT"
        if chance.random() < 0.1:
            end = f"PREPARE TRANSACTION '{seed}-{number}'; COMMIT PREPARED '{seed}-{number}'"
        lines.append(f"BEGIN; {body}; {end}")
    return ";\n".join(lines)


WORKLOADS = {
    "types": TYPES,
    "identities": IDENTITIES,
    "partitions": PARTITIONS,
    "transactions": TRANSACTIONS,
    **{f"random {seed}": _random_workload(seed) for seed in range(3)},
}
"""By name; each begins with empty tables."""


def statements(script: str) -> list[str]:
    """Return the single statements of a script; the server requires that for some."""
    return [statement for statement in script.split(";") if statement.strip()]
