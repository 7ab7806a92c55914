-- Kamailio 6.0's own tables (kamailio-postgres-modules, standard-create.sql and its neighbours), as far as they are used.
-- The modules refuse a table whose version is not the one they were written for.
CREATE TABLE IF NOT EXISTS version (
  id serial PRIMARY KEY,
  table_name varchar(32) NOT NULL UNIQUE,
  table_version integer NOT NULL DEFAULT 0
);
INSERT INTO version (table_name, table_version)
  VALUES ('version', 1), ('subscriber', 7), ('location', 9)
  ON CONFLICT (table_name) DO UPDATE SET table_version = EXCLUDED.table_version;

-- password stays empty: ha1 is all that digest authentication needs (RFC 2617, 3.2.2.2).
CREATE TABLE IF NOT EXISTS subscriber (
  id serial PRIMARY KEY,
  username varchar(64) NOT NULL DEFAULT '',
  domain varchar(64) NOT NULL DEFAULT '',
  password varchar(64) NOT NULL DEFAULT '' CHECK (password = ''),
  ha1 varchar(128) NOT NULL DEFAULT '',
  ha1b varchar(128) NOT NULL DEFAULT '',
  UNIQUE (username, domain)
);

CREATE TABLE IF NOT EXISTS location (
  id serial PRIMARY KEY,
  ruid varchar(64) NOT NULL DEFAULT '' UNIQUE,
  username varchar(64) NOT NULL DEFAULT '',
  domain varchar(64) DEFAULT NULL,
  contact varchar(512) NOT NULL DEFAULT '',
  received varchar(128) DEFAULT NULL,
  path varchar(512) DEFAULT NULL,
  expires timestamp NOT NULL DEFAULT '2030-05-28 21:32:15',
  q real NOT NULL DEFAULT 1.0,
  callid varchar(255) NOT NULL DEFAULT 'Default-Call-ID',
  cseq integer NOT NULL DEFAULT 1,
  last_modified timestamp NOT NULL DEFAULT '2000-01-01 00:00:01',
  flags integer NOT NULL DEFAULT 0,
  cflags integer NOT NULL DEFAULT 0,
  user_agent varchar(255) NOT NULL DEFAULT '',
  socket varchar(64) DEFAULT NULL,
  methods integer DEFAULT NULL,
  instance varchar(255) DEFAULT NULL,
  reg_id integer NOT NULL DEFAULT 0,
  server_id integer NOT NULL DEFAULT 0,
  connection_id integer NOT NULL DEFAULT 0,
  keepalive integer NOT NULL DEFAULT 0,
  partition integer NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS location_account_contact_idx ON location (username, domain, contact);
CREATE INDEX IF NOT EXISTS location_expires_idx ON location (expires);

-- The proxy checks passwords and keeps registrations; it can't make a subscriber.
GRANT SELECT ON version, subscriber TO kamailio;
GRANT SELECT, INSERT, UPDATE, DELETE ON location TO kamailio;
GRANT USAGE ON SEQUENCE location_id_seq TO kamailio;
