//! The options of a server of TYPE 'kafka' and of its user mapping, as a configuration of librdkafka.
//!
//! Any property of librdkafka may be given, but for those by which records would be skipped, read twice or read before they
//! are committed; those that run or load code of the server's machine; and those that are callbacks. Secrets belong into the
//! user mapping. Properties that make librdkafka read files of the server are told apart: the caller decides who may.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::SourceError;

/// Set by us, whatever the user says; asking for the same is no error.
const FIXED: [(&str, &str); 9] = [
    ("enable.auto.commit", "false"),
    ("enable.auto.offset.store", "false"),
    // Never silently skip.
    ("auto.offset.reset", "error"),
    ("isolation.level", "read_committed"),
    ("enable.partition.eof", "false"),
    // Asking for a topic must not make it.
    ("allow.auto.create.topics", "false"),
    ("check.crcs", "true"),
    // Groups rebalance and join; we assign by hand.
    ("group.protocol", "classic"),
    ("enable.sasl.oauthbearer.unsecure.jwt", "false"),
];

/// Ours unless the user says otherwise.
const DEFAULTS: [(&str, &str); 8] = [
    ("client.id", "rakam"),
    // A consumer has to have one; nobody joins it.
    ("group.id", "rakam"),
    // What waits in memory beside the batch that is being stored.
    ("queued.max.messages.kbytes", "16384"),
    ("queued.min.messages", "20000"),
    ("fetch.wait.max.ms", "100"),
    ("fetch.queue.backoff.ms", "10"),
    ("reconnect.backoff.max.ms", "2000"),
    ("topic.metadata.refresh.interval.ms", "30000"),
];

/// As [`FIXED`], for clients that write: nothing is given up but by us, and nothing overtakes what came before it.
const WRITING: [(&str, &str); 6] = [
    ("enable.idempotence", "true"),
    // A broker that has nothing of a producer yet takes whatever comes first: what is behind a batch that it refuses, too.
    ("max.in.flight.requests.per.connection", "1"),
    ("enable.gapless.guarantee", "true"),
    ("acks", "all"),
    // Without end: an outage is waited out.
    ("message.timeout.ms", "0"),
    ("queuing.strategy", "fifo"),
];
const WRITING_ALIASES: [(&str, &str); 3] = [
    ("max.in.flight", "max.in.flight.requests.per.connection"),
    ("request.required.acks", "acks"),
    ("delivery.timeout.ms", "message.timeout.ms"),
];
/// As [`DEFAULTS`], for clients that write: names of the property, and its value.
const WRITING_DEFAULTS: [(&[&str], &str); 3] = [
    (&["compression.codec", "compression.type"], "lz4"),
    // What a topic takes the broker decides.
    (&["message.max.bytes"], "16777216"),
    // A batch of the relay fits in.
    (&["queue.buffering.max.kbytes"], "65536"),
];

/// Refused, with the reason.
const REFUSED: [(&str, &str); 21] = [
    ("plugin.library.paths", CODE),
    ("ssl.engine.location", CODE),
    ("ssl.engine.id", CODE),
    ("ssl.providers", CODE),
    ("sasl.kerberos.kinit.cmd", CODE),
    ("internal.termination.signal", SIGNAL),
    ("sasl.kerberos.keytab", KERBEROS),
    ("sasl.kerberos.principal", KERBEROS),
    ("sasl.kerberos.service.name", KERBEROS),
    ("sasl.kerberos.min.time.before.relogin", KERBEROS),
    ("group.instance.id", GROUPS),
    ("group.remote.assignor", GROUPS),
    ("partition.assignment.strategy", GROUPS),
    ("auto.commit.interval.ms", GROUPS),
    ("auto.commit.enable", GROUPS),
    ("enable.auto.commit.interval.ms", GROUPS),
    ("offset.store.method", GROUPS),
    ("consume.callback.max.messages", CALLBACK),
    ("enabled_events", CALLBACK),
    (
        "test.mock.num.brokers",
        "it would replace the cluster by an imitation",
    ),
    ("delivery.report.only.error", CALLBACK),
];
const CODE: &str = "it makes the database server load or run a program";
const SIGNAL: &str = "it sends signals to the database server";
const KERBEROS: &str = "Kerberos is not built in";
const GROUPS: &str = "offsets are kept in the database, without consumer groups";
const CALLBACK: &str = "it has no meaning here";

/// Names that librdkafka has for a property beside the one that we use.
const ALIASES: [(&str, &str); 5] = [
    ("brokers", "bootstrap.servers"),
    ("metadata.broker.list", "bootstrap.servers"),
    ("sasl.mechanism", "sasl.mechanisms"),
    ("username", "sasl.username"),
    ("password", "sasl.password"),
];

/// Only in a user mapping: everybody may read a server's options.
const SECRETS: [&str; 7] = [
    "sasl.password",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.password",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.config",
    "sasl.oauthbearer.assertion.private.key.pem",
];

/// Makes librdkafka read a file.
const FILES: [&str; 7] = [
    "ssl.key.location",
    "ssl.certificate.location",
    "ssl.ca.location",
    "ssl.crl.location",
    "ssl.keystore.location",
    "https.ca.location",
    "sasl.oauthbearer.assertion.private.key.file",
];

/// A checked configuration. Its `Debug` shows names only: some values are secrets.
#[derive(Clone, PartialEq, Eq)]
pub struct KafkaConfig {
    properties: BTreeMap<String, String>,
}

impl fmt::Debug for KafkaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.properties.keys()).finish()
    }
}

impl KafkaConfig {
    /// From the options of a server and of its owner's user mapping.
    ///
    /// Error: 22023 for an option that is refused or misplaced, or without brokers. That a property exists and takes its
    /// value librdkafka knows: see [`super::client::check`].
    pub fn parse<'a>(
        server: impl IntoIterator<Item = (&'a str, &'a str)>,
        mapping: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, SourceError> {
        let mut properties = BTreeMap::new();
        for (name, value) in server {
            let name = checked(name, value)?;
            if SECRETS.contains(&name) {
                return Err(SourceError::option(
                    format!("option \"{name}\" is a secret"),
                    "Everybody can read a server's options: give it in the user mapping of the server's owner.",
                ));
            }
            add(&mut properties, name, value)?;
        }
        for (name, value) in mapping {
            let name = checked(name, value)?;
            if !SECRETS.contains(&name) && name != "sasl.username" {
                return Err(SourceError::option(
                    format!("option \"{name}\" does not belong into a user mapping"),
                    format!(
                        "A user mapping for Kafka has username, password and {}.",
                        SECRETS.join(", ")
                    ),
                ));
            }
            add(&mut properties, name, value)?;
        }
        if !properties.contains_key("bootstrap.servers") {
            return Err(SourceError::option(
                "option \"brokers\" is missing",
                "Name one or more brokers of the cluster: OPTIONS (brokers 'kafka1:9092,kafka2:9092').",
            ));
        }
        if uses_sasl(&properties) {
            // librdkafka's own default is Kerberos.
            properties
                .entry("sasl.mechanisms".to_owned())
                .or_insert_with(|| "PLAIN".to_owned());
        }
        for (name, value) in FIXED {
            properties.insert(name.to_owned(), value.to_owned());
        }
        for (name, value) in DEFAULTS {
            properties
                .entry(name.to_owned())
                .or_insert_with(|| value.to_owned());
        }
        Ok(Self { properties })
    }

    /// Whether there are credentials that no broker is ever shown, because "security.protocol" does not ask for them.
    pub fn ignores_credentials(&self) -> bool {
        self.properties.contains_key("sasl.username") && !uses_sasl(&self.properties)
    }

    /// The same with credentials of nobody where it has none: without any librdkafka makes no client that is to show some.
    pub(crate) fn with_any_credentials(&self) -> Self {
        let mut any = self.clone();
        if uses_sasl(&any.properties) {
            for name in ["sasl.username", "sasl.password"] {
                let given = any.properties.entry(name.to_owned());
                given.or_insert_with(|| "nobody".to_owned());
            }
        }
        any
    }

    /// Names and values for librdkafka, by name.
    pub(crate) fn properties(&self) -> impl Iterator<Item = (&str, &str)> {
        self.properties
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The same for a client that writes. Error: 22023 for an option by which records could be lost or change their order.
    pub(crate) fn for_producer(&self) -> Result<BTreeMap<String, String>, SourceError> {
        let mut properties = self.properties.clone();
        for (name, fixed) in WRITING {
            for name in WRITING_ALIASES
                .iter()
                .filter(|(_, own)| *own == name)
                .map(|(alias, _)| *alias)
                .chain([name])
            {
                let given = properties.remove(name);
                if let Some(given) = given.filter(|given| !given.eq_ignore_ascii_case(fixed)) {
                    return Err(SourceError::option(
                        format!("option \"{name}\" of an event store cannot be \"{given}\""),
                        format!(
                            "Each event arrives, and in the order of its key, because it is \"{fixed}\": leave the option out."
                        ),
                    ));
                }
            }
            properties.insert(name.to_owned(), fixed.to_owned());
        }
        if properties.contains_key("transactional.id") {
            return Err(SourceError::option(
                "option \"transactional.id\" cannot be set for an event store",
                "Leave the option out: what is sent twice is told by its headers.",
            ));
        }
        // Asking for a topic may make it here: it is about to be written.
        properties.insert("allow.auto.create.topics".to_owned(), "true".to_owned());
        for (names, value) in WRITING_DEFAULTS {
            if !names.iter().any(|name| properties.contains_key(*name)) {
                properties.insert(names[0].to_owned(), value.to_owned());
            }
        }
        Ok(properties)
    }

    /// The options by which librdkafka reads files of the server: who gives them needs the right to.
    pub fn file_options(&self) -> Vec<&str> {
        let is_file = |name: &&str| FILES.contains(name);
        // A certificate store of the system is no file of the user's choice.
        self.properties()
            .filter(|(_, value)| *value != "probe")
            .map(|(name, _)| name)
            .filter(is_file)
            .collect()
    }
}

fn uses_sasl(properties: &BTreeMap<String, String>) -> bool {
    let protocol = properties.get("security.protocol");
    protocol.is_some_and(|protocol| protocol.to_ascii_lowercase().starts_with("sasl"))
}

/// librdkafka's name of an option that may be given.
fn checked<'a>(name: &'a str, value: &str) -> Result<&'a str, SourceError> {
    let name = ALIASES
        .iter()
        .find(|(alias, _)| *alias == name)
        .map_or(name, |(_, own)| own);
    if let Some((_, reason)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
        return Err(SourceError::option(
            format!("option \"{name}\" cannot be set: {reason}"),
            "Leave the option out.",
        ));
    }
    if let Some((_, fixed)) = FIXED.iter().find(|(fixed, _)| *fixed == name)
        && !fixed.eq_ignore_ascii_case(value)
    {
        return Err(SourceError::option(
            format!("option \"{name}\" cannot be \"{value}\""),
            format!(
                "Each event counts exactly once because it is \"{fixed}\": leave the option out."
            ),
        ));
    }
    let gssapi = name == "sasl.mechanisms" && value.to_ascii_uppercase().contains("GSSAPI");
    if gssapi {
        return Err(SourceError::option(
            format!("option \"{name}\" cannot be \"{value}\": {KERBEROS}"),
            "Mechanisms are PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 and OAUTHBEARER.",
        ));
    }
    Ok(name)
}

fn add(
    properties: &mut BTreeMap<String, String>,
    name: &str,
    value: &str,
) -> Result<(), SourceError> {
    let before = properties.insert(name.to_owned(), value.to_owned());
    if before.is_some() {
        return Err(SourceError::option(
            format!("option \"{name}\" is given twice"),
            "An option may have several names; use one of them.",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(server: &[(&str, &str)], mapping: &[(&str, &str)]) -> Result<KafkaConfig, String> {
        KafkaConfig::parse(server.iter().copied(), mapping.iter().copied())
            .map_err(|e| e.to_string())
    }

    fn get<'a>(config: &'a KafkaConfig, name: &str) -> Option<&'a str> {
        config.properties.get(name).map(String::as_str)
    }

    #[test]
    fn options_become_properties() {
        let config = parse(
            &[
                ("brokers", "a:1,b:2"),
                ("fetch.min.bytes", "2"),
                ("queued.max.messages.kbytes", "100"),
                ("isolation.level", "READ_COMMITTED"),
                ("ssl.ca.location", "/etc/ca.pem"),
                ("sasl.mechanism", "SCRAM-SHA-256"),
                ("security.protocol", "SASL_SSL"),
            ],
            &[("username", "u"), ("password", "s3cret")],
        );
        let config = config.unwrap_or_else(|e| panic!("{e}"));
        for (name, value) in [
            ("bootstrap.servers", "a:1,b:2"),
            ("fetch.min.bytes", "2"),
            ("queued.max.messages.kbytes", "100"),
            ("isolation.level", "read_committed"),
            ("auto.offset.reset", "error"),
            ("enable.auto.commit", "false"),
            ("sasl.username", "u"),
            ("sasl.password", "s3cret"),
            ("sasl.mechanisms", "SCRAM-SHA-256"),
        ] {
            assert_eq!(get(&config, name), Some(value), "{name}");
        }
        assert_eq!(config.file_options(), ["ssl.ca.location"]);
        assert!(!format!("{config:?}").contains("s3cret"));
        let plain = parse(
            &[("brokers", "a"), ("security.protocol", "sasl_plaintext")],
            &[("username", "u")],
        );
        let plain = plain.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(get(&plain, "sasl.mechanisms"), Some("PLAIN"));
        assert!(!plain.ignores_credentials());
        // As librdkafka has it: nobody is asked for them.
        let unused = parse(&[("brokers", "a")], &[("username", "u"), ("password", "p")]);
        assert!(unused.is_ok_and(|config| config.ignores_credentials()));
    }

    #[test]
    fn writing_loses_nothing() {
        let with = |options: &[(&str, &str)]| {
            let mut server = vec![("brokers", "a")];
            server.extend(options);
            let config = parse(&server, &[]).unwrap_or_else(|e| panic!("{e}"));
            config.for_producer()
        };
        let properties = with(&[("compression.type", "gzip")]).unwrap_or_else(|e| panic!("{e}"));
        let get = |name: &str| properties.get(name).map(String::as_str);
        assert_eq!(get("enable.idempotence"), Some("true"));
        assert_eq!(get("message.timeout.ms"), Some("0"));
        assert_eq!(get("max.in.flight.requests.per.connection"), Some("1"));
        assert_eq!(get("bootstrap.servers"), Some("a"));
        assert_eq!(
            (get("compression.type"), get("compression.codec")),
            (Some("gzip"), None)
        );
        assert!(with(&[("acks", "ALL"), ("delivery.timeout.ms", "0")]).is_ok());
        for (name, value) in [
            ("acks", "1"),
            ("request.required.acks", "1"),
            ("enable.idempotence", "false"),
            ("delivery.timeout.ms", "5000"),
            ("max.in.flight", "5"),
            ("transactional.id", "x"),
        ] {
            assert!(
                with(&[(name, value)]).is_err_and(|e| e.sqlstate() == "22023"),
                "{name}"
            );
        }
    }

    #[test]
    fn what_would_break_exactness_or_the_server_is_refused() {
        for (name, value) in [
            ("enable.auto.commit", "true"),
            ("auto.offset.reset", "earliest"),
            ("isolation.level", "read_uncommitted"),
            ("enable.partition.eof", "true"),
            ("group.instance.id", "x"),
            ("plugin.library.paths", "/tmp/x.so"),
            ("internal.termination.signal", "9"),
            ("sasl.kerberos.kinit.cmd", "true"),
            ("sasl.kerberos.principal", "x; true"),
            ("sasl.mechanisms", "gssapi"),
            ("sasl.password", "x"),
            ("password", "x"),
            ("ssl.key.pem", "x"),
            ("bootstrap.servers", "twice"),
        ] {
            let refused = parse(&[("brokers", "a"), (name, value)], &[]);
            assert!(refused.is_err(), "{name}");
        }
        assert!(parse(&[], &[]).is_err());
        assert!(parse(&[("brokers", "a")], &[("fetch.min.bytes", "1")]).is_err());
    }
}
