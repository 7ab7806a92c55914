-- A column gets the CDR variable of its name (cdr_adaptive_odbc). Times are UTC, durations seconds.
-- uniqueid is the channel's, sequence tells the CDRs of one channel apart: together they name a CDR.
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

-- The PBX writes CDRs. It reads none and changes none.
GRANT INSERT ON cdr TO cdr;
GRANT USAGE ON SEQUENCE cdr_id_seq TO cdr;
