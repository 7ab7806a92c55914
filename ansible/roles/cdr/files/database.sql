-- A column has the CDR variable of its name. Times are UTC, durations seconds.
-- uniqueid is the channel's, sequence tells the CDRs of one channel apart: together they name a CDR, which may come twice.
CREATE TABLE IF NOT EXISTS cdr (
  id bigserial PRIMARY KEY,
  start timestamp NOT NULL,
  answer timestamp,
  "end" timestamp,
  clid varchar(80),
  src varchar(80),
  dst varchar(80),
  dcontext varchar(80),
  channel varchar(80),
  dstchannel varchar(80),
  lastapp varchar(80),
  lastdata varchar(200),
  duration integer,
  billsec integer,
  disposition varchar(45),
  amaflags varchar(20),
  accountcode varchar(80),
  peeraccount varchar(80),
  uniqueid varchar(150) NOT NULL,
  linkedid varchar(150),
  userfield varchar(255),
  sequence integer NOT NULL DEFAULT 0,
  UNIQUE (uniqueid, sequence)
);
CREATE INDEX IF NOT EXISTS cdr_start_idx ON cdr (start);
CREATE INDEX IF NOT EXISTS cdr_linkedid_idx ON cdr (linkedid);

-- The outbox: what is still to be told of new CDRs. docs/cdr-event.schema.json describes the payload.
CREATE TABLE IF NOT EXISTS cdr_event (
  id bigserial PRIMARY KEY,
  created timestamptz NOT NULL DEFAULT now(),
  payload jsonb NOT NULL
);
-- With its owner's rights: who writes a CDR can't write an event.
CREATE OR REPLACE FUNCTION cdr_event() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  iso CONSTANT text := 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"';
BEGIN
  INSERT INTO public.cdr_event (payload) VALUES (to_jsonb(NEW) || jsonb_build_object(
    'version', 1,
    'id', NEW.uniqueid || ':' || NEW.sequence,
    'start', to_char(NEW.start, iso),
    'answer', to_char(NEW.answer, iso),
    'end', to_char(NEW."end", iso)));
  RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER cdr_event AFTER INSERT ON cdr FOR EACH ROW EXECUTE FUNCTION cdr_event();

-- CDRs are written with INSERT ... ON CONFLICT DO NOTHING, and neither read nor changed.
GRANT INSERT ON cdr TO cdr;
GRANT USAGE ON SEQUENCE cdr_id_seq TO cdr;
-- An event that has been published is removed.
GRANT SELECT, DELETE ON cdr_event TO cdr_publisher;
