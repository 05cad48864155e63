-- What pgrealtime needs of the tables that it serves: that the query role may read them, and that
-- the WAL carries the whole old row (REPLICA IDENTITY FULL). Run it as the tables' owner, after
-- sql/roles.sql, and again for further tables. Safe to run again.
--
--   PGOPTIONS='-c pgrealtime.tables=public.users,public.posts' psql -d app -f sql/tables.sql
--
-- Name all tables of the configuration and all that rules reach through relations, junction tables
-- included. Names are as in SQL: upper case and odd characters in double quotes.
--
-- Without FULL a delete logs the primary key only, and an update does not log a large value that it
-- leaves unchanged: rules that need more are then evaluated with the present row, or deny.
-- FULL makes updates and deletes write the whole old row to the WAL. On PostgreSQL 18 it can't be
-- combined with a generated column that a publication of the table leaves out.
DO $$
DECLARE
  query_role text :=
    coalesce(nullif(current_setting('pgrealtime.query_role', true), ''), 'pgrealtime_query');
  name text;
  served record;
  part record;
BEGIN
  IF coalesce(current_setting('pgrealtime.tables', true), '') = '' THEN
    RAISE EXCEPTION 'no tables were named'
      USING HINT = 'PGOPTIONS=''-c pgrealtime.tables=public.users,public.posts'' psql ...';
  END IF;
  -- ALTER TABLE waits for the table's readers and writers, and makes all later ones wait behind it.
  PERFORM set_config('lock_timeout', '5s', true);

  FOREACH name IN ARRAY string_to_array(current_setting('pgrealtime.tables'), ',') LOOP
    SELECT n.nspname AS schema_name, c.oid::regclass AS relation INTO STRICT served
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = trim(name)::regclass;

    EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', served.schema_name, query_role);
    EXECUTE format('GRANT SELECT ON TABLE %s TO %I', served.relation, query_role);

    -- Partitions have identities of their own; altering the root doesn't reach them.
    FOR part IN
      SELECT c.oid::regclass AS relation
      FROM pg_catalog.pg_partition_tree(served.relation) t
      JOIN pg_catalog.pg_class c ON c.oid = t.relid
      WHERE c.relkind IN ('r', 'p') AND c.relreplident <> 'f'
      UNION
      SELECT c.oid::regclass
      FROM pg_catalog.pg_class c
      WHERE c.oid = served.relation AND c.relkind = 'r' AND c.relreplident <> 'f'
    LOOP
      EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', part.relation);
    END LOOP;
  END LOOP;
END $$;
