-- Realtime tables of Asterisk 22 (contrib/realtime), with the columns that trunks and voicemail use.
CREATE TABLE IF NOT EXISTS ps_aors (
  id varchar(255) PRIMARY KEY,
  contact varchar(255),
  default_expiration integer,
  mailboxes varchar(80),
  max_contacts integer,
  minimum_expiration integer,
  maximum_expiration integer,
  remove_existing varchar(3),
  qualify_frequency integer,
  qualify_timeout real,
  authenticate_qualify varchar(3),
  outbound_proxy varchar(255),
  support_path varchar(3)
);
CREATE TABLE IF NOT EXISTS ps_auths (
  id varchar(255) PRIMARY KEY,
  auth_type varchar(20),
  nonce_lifetime integer,
  md5_cred varchar(40),
  password varchar(80),
  realm varchar(255),
  username varchar(80)
);
CREATE TABLE IF NOT EXISTS ps_endpoints (
  id varchar(255) PRIMARY KEY,
  transport varchar(40),
  aors varchar(2048),
  auth varchar(255),
  outbound_auth varchar(255),
  outbound_proxy varchar(255),
  context varchar(40),
  disallow varchar(200),
  allow varchar(200),
  direct_media varchar(3),
  rtp_symmetric varchar(3),
  force_rport varchar(3),
  rewrite_contact varchar(3),
  from_user varchar(40),
  from_domain varchar(40),
  callerid varchar(40),
  dtmf_mode varchar(20),
  identify_by varchar(80),
  send_pai varchar(3),
  trust_id_inbound varchar(3),
  timers varchar(20),
  device_state_busy_at integer
);
CREATE TABLE IF NOT EXISTS voicemail (
  uniqueid serial PRIMARY KEY,
  context varchar(80) NOT NULL DEFAULT 'default',
  mailbox varchar(80) NOT NULL,
  password varchar(80) NOT NULL,
  fullname varchar(80),
  email varchar(80),
  tz varchar(30),
  attach varchar(3),
  UNIQUE (context, mailbox)
);

-- The PBX reads; a user may change the PIN of a mailbox by phone.
GRANT SELECT ON ps_aors, ps_auths, ps_endpoints, voicemail TO asterisk;
GRANT UPDATE (password) ON voicemail TO asterisk;
