//! The options of a server of TYPE 'kinesis' and of its user mapping.

use std::fmt;

use crate::error::SourceError;

/// Where streams are, and how they are entered.
#[derive(Clone, PartialEq, Eq)]
pub struct KinesisConfig {
    pub region: String,
    /// Instead of the region's own.
    pub endpoint: Option<String>,
    /// None: what the machine itself is allowed (environment, web identity, container, instance).
    pub credentials: Option<Credentials>,
}

/// Long-lived or temporary keys. `Debug` shows none of them.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

impl fmt::Debug for KinesisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KinesisConfig")
            .field("region", &self.region)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl KinesisConfig {
    /// Error: 22023 for an option that is unknown, misplaced or malformed, or without region.
    pub fn parse<'a>(
        server: impl IntoIterator<Item = (&'a str, &'a str)>,
        mapping: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, SourceError> {
        let (mut region, mut endpoint) = (None, None);
        for (name, value) in server {
            match name {
                "region" if is_region(value) => region = Some(value.to_owned()),
                "endpoint" if is_url(value) => {
                    endpoint = Some(value.trim_end_matches('/').to_owned());
                }
                "region" | "endpoint" => {
                    return Err(SourceError::option(
                        format!("option \"{name}\" cannot be \"{value}\""),
                        "A region looks like us-east-1, an endpoint like http://127.0.0.1:4567.",
                    ));
                }
                _ => {
                    return Err(SourceError::option(
                        format!("unknown option \"{name}\""),
                        "A server for Kinesis has region and endpoint; keys belong into the user mapping of its owner.",
                    ));
                }
            }
        }
        let (mut id, mut secret, mut token) = (None, None, None);
        for (name, value) in mapping {
            let value = Some(value.to_owned());
            match name {
                "access_key_id" => id = value,
                "secret_access_key" => secret = value,
                "session_token" => token = value,
                _ => {
                    return Err(SourceError::option(
                        format!("unknown option \"{name}\""),
                        "A user mapping for Kinesis has access_key_id, secret_access_key and session_token.",
                    ));
                }
            }
        }
        let credentials = match (id, secret, token) {
            (Some(access_key_id), Some(secret_access_key), session_token) => Some(Credentials {
                access_key_id,
                secret_access_key,
                session_token,
            }),
            (None, None, None) => None,
            _ => {
                return Err(SourceError::option(
                    "user mapping has only a part of a key",
                    "Give access_key_id and secret_access_key, and session_token if they are temporary.",
                ));
            }
        };
        let region = region.ok_or_else(|| {
            SourceError::option(
                "option \"region\" is missing",
                "Name the region of the streams: OPTIONS (region 'us-east-1').",
            )
        })?;
        Ok(Self {
            region,
            endpoint,
            credentials,
        })
    }
}

fn is_region(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn is_url(text: &str) -> bool {
    let rest = text
        .strip_prefix("http://")
        .or_else(|| text.strip_prefix("https://"));
    // Keys in a URL would be shown to everybody.
    rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(['@', '?', '#', ' ']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(
        server: &[(&str, &str)],
        mapping: &[(&str, &str)],
    ) -> Result<KinesisConfig, SourceError> {
        KinesisConfig::parse(server.iter().copied(), mapping.iter().copied())
    }

    #[test]
    fn options() {
        let keys = [("access_key_id", "AKIA"), ("secret_access_key", "s3cret")];
        let server = [
            ("region", "us-east-1"),
            ("endpoint", "http://127.0.0.1:4567/"),
        ];
        let config = parse(&server, &keys).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(config.endpoint.as_deref(), Some("http://127.0.0.1:4567"));
        let secret = config
            .credentials
            .as_ref()
            .map(|c| c.secret_access_key.as_str());
        assert_eq!(secret, Some("s3cret"));
        assert!(!format!("{config:?}").contains("s3cret"));
        let chain = parse(&[("region", "eu-west-1")], &[]);
        assert!(chain.is_ok_and(|c| c.credentials.is_none()));
        for (server, mapping) in [
            (&[][..], &[][..]),
            (&[("region", "US")], &[]),
            (&[("region", "a"), ("endpoint", "ftp://x")], &[]),
            (&[("region", "a"), ("endpoint", "http://k:s@x")], &[]),
            (&[("region", "a"), ("access_key_id", "x")], &[]),
            (&[("region", "a")], &keys[..1]),
            (&[("region", "a")], &[("password", "x")]),
        ] {
            let error = parse(server, mapping);
            assert!(error.is_err_and(|e| e.sqlstate() == "22023"), "{server:?}");
        }
    }
}
