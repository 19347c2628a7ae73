-- Tables beside those of version 1. A Spinney that does not know them loses nothing but what they say.

CREATE TABLE IF NOT EXISTS damaged (
    snapshot TEXT PRIMARY KEY,
    problem  TEXT NOT NULL
) STRICT;

CREATE TABLE IF NOT EXISTS clock (
    one    INTEGER PRIMARY KEY CHECK (one = 1),
    wall   INTEGER NOT NULL,
    uptime INTEGER NOT NULL,
    boot   TEXT NOT NULL,
    jumped INTEGER
) STRICT;

CREATE TABLE IF NOT EXISTS expiry (
    snapshot TEXT PRIMARY KEY,
    after    INTEGER NOT NULL,
    since    INTEGER NOT NULL,
    jumped   INTEGER,
    spent    INTEGER NOT NULL
) STRICT;

CREATE TABLE IF NOT EXISTS powered_off (
    target TEXT PRIMARY KEY,
    why    TEXT
) STRICT;

CREATE TABLE IF NOT EXISTS throw_away (
    target TEXT PRIMARY KEY
) STRICT;
