//! The options of a storage's foreign server, and the credentials in its owner's user mapping.
//!
//! Values of credentials are in no message and in no debug output.

use std::fmt;
use std::path::PathBuf;

use super::url::{Cloud, StorageUrl};
use crate::error::LakeError;

/// The options of a server that is a storage, besides `url`.
pub const SERVER_OPTIONS: [&str; 8] = [
    "region",
    "endpoint",
    "allow_http",
    "path_style",
    "sse",
    "sse_kms_key_id",
    "sse_bucket_key",
    "ca_file",
];
/// Those that buckets other than S3's have, too.
const COMMON_OPTIONS: [&str; 3] = ["endpoint", "allow_http", "ca_file"];

/// The options of a user mapping.
pub const CREDENTIAL_OPTIONS: [&str; 7] = [
    "access_key_id",
    "secret_access_key",
    "session_token",
    "service_account_key",
    "account_name",
    "account_key",
    "sas_token",
];

/// How a storage is spoken to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StorageOptions {
    pub region: Option<String>,
    /// `http(s)://host[:port][/path]`, without a slash at its end.
    pub endpoint: Option<String>,
    pub allow_http: bool,
    /// Whether the bucket is named in the path rather than the host name; None: as is usual for the endpoint.
    pub path_style: Option<bool>,
    pub sse: Option<String>,
    pub sse_kms_key_id: Option<String>,
    pub sse_bucket_key: Option<bool>,
    /// Certificates (PEM) to be trusted besides the machine's own.
    pub ca_file: Option<PathBuf>,
}

impl StorageOptions {
    /// Reads a server's options; `url` among them is skipped.
    pub fn parse(url: &StorageUrl, options: &[(&str, &str)]) -> Result<Self, LakeError> {
        let valid: &[&str] = match url {
            StorageUrl::File(_) => &[],
            StorageUrl::Bucket(bucket) if bucket.cloud == Cloud::S3 => &SERVER_OPTIONS,
            StorageUrl::Bucket(_) => &COMMON_OPTIONS,
        };
        let mut out = Self::default();
        for &(name, value) in options {
            if name == "url" {
                continue;
            }
            if !valid.contains(&name) {
                return Err(LakeError::InvalidOption {
                    message: format!(
                        "option \"{name}\" is not valid for a storage of kind \"{}\"",
                        url.kind()
                    ),
                    hint: if valid.is_empty() {
                        "A directory has no option but url.".to_owned()
                    } else {
                        format!("Valid options are: url, {}.", valid.join(", "))
                    },
                });
            }
            if value.is_empty() {
                return Err(bad(name, "must not be empty", "Leave it out instead."));
            }
            out.set(name, value)?;
        }
        out.check()?;
        Ok(out)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), LakeError> {
        match name {
            "region" => {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
                if !value.bytes().all(plain) {
                    return Err(bad(
                        name,
                        "is not the name of a region",
                        "It looks like eu-central-1.",
                    ));
                }
                self.region = Some(value.to_owned());
            }
            "endpoint" => self.endpoint = Some(endpoint(value)?),
            "allow_http" => self.allow_http = boolean(name, value)?,
            "path_style" => self.path_style = Some(boolean(name, value)?),
            "sse" => {
                if !matches!(value, "AES256" | "aws:kms" | "aws:kms:dsse") {
                    return Err(bad(
                        name,
                        "is not a known way of encryption",
                        "Use AES256, aws:kms or aws:kms:dsse.",
                    ));
                }
                self.sse = Some(value.to_owned());
            }
            "sse_kms_key_id" => {
                if !value.bytes().all(|b| b.is_ascii_graphic()) {
                    return Err(bad(
                        name,
                        "is not the id of a key",
                        "Give the id, alias or ARN of the key.",
                    ));
                }
                self.sse_kms_key_id = Some(value.to_owned());
            }
            "sse_bucket_key" => self.sse_bucket_key = Some(boolean(name, value)?),
            _ => {
                if !value.starts_with('/') {
                    return Err(bad(
                        name,
                        "must be an absolute path",
                        "Name a file of certificates in PEM format on the server.",
                    ));
                }
                self.ca_file = Some(PathBuf::from(value));
            }
        }
        Ok(())
    }

    /// What options mean together.
    fn check(&self) -> Result<(), LakeError> {
        let plain_http = |e: &String| e.starts_with("http://");
        if !self.allow_http && self.endpoint.as_ref().is_some_and(plain_http) {
            return Err(bad(
                "endpoint",
                "is not encrypted",
                "Use https://, or allow it with the option allow_http 'true'.",
            ));
        }
        let kms = self.sse.as_deref().is_some_and(|sse| sse != "AES256");
        if !kms && (self.sse_kms_key_id.is_some() || self.sse_bucket_key.is_some()) {
            return Err(LakeError::InvalidOption {
                message:
                    "options \"sse_kms_key_id\" and \"sse_bucket_key\" need the option \"sse\""
                        .to_owned(),
                hint: "Add sse 'aws:kms' or sse 'aws:kms:dsse'.".to_owned(),
            });
        }
        Ok(())
    }
}

fn bad(name: &str, what: &str, hint: &str) -> LakeError {
    LakeError::InvalidOption {
        message: format!("option \"{name}\" {what}"),
        hint: hint.to_owned(),
    }
}

fn boolean(name: &str, value: &str) -> Result<bool, LakeError> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "on" | "yes" | "1" => Ok(true),
        "false" | "off" | "no" | "0" => Ok(false),
        _ => Err(bad(
            name,
            "must be a boolean value",
            "Use 'true' or 'false'.",
        )),
    }
}

fn endpoint(value: &str) -> Result<String, LakeError> {
    let bad = |what| {
        bad(
            "endpoint",
            what,
            "It looks like https://host:port; credentials belong into a user mapping of the server's owner.",
        )
    };
    let rest = value
        .strip_prefix("https://")
        .or_else(|| value.strip_prefix("http://"))
        .ok_or_else(|| bad("must begin with https:// or http://"))?;
    if rest.contains(['@', '?', '#']) {
        return Err(bad("must not contain \"@\", \"?\" or \"#\""));
    }
    let host = rest.split('/').next().unwrap_or_default();
    if host.is_empty() || !rest.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(bad("is not a valid address"));
    }
    Ok(value.trim_end_matches('/').to_owned())
}

/// What a storage knows its user by.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    /// No mapping: the cloud's own chain (environment, web identity, the machine's role).
    #[default]
    Chain,
    S3 {
        access_key_id: String,
        secret_access_key: String,
        session_token: Option<String>,
    },
    Google {
        service_account_key: String,
    },
    Azure {
        account_name: Option<String>,
        secret: AzureSecret,
    },
}

/// How an account of Azure is entered.
#[derive(Clone, PartialEq, Eq)]
pub enum AzureSecret {
    /// The machine's identity.
    Chain,
    AccountKey(String),
    /// The pairs of a shared access signature.
    Sas(Vec<(String, String)>),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chain => "Chain",
            Self::S3 { .. } => "S3(redacted)",
            Self::Google { .. } => "Google(redacted)",
            Self::Azure { .. } => "Azure(redacted)",
        })
    }
}

impl Credentials {
    /// Reads the options of a user mapping.
    pub fn parse(options: &[(&str, &str)]) -> Result<Self, LakeError> {
        for (name, value) in options {
            if !CREDENTIAL_OPTIONS.contains(name) {
                return Err(LakeError::InvalidOption {
                    message: format!("invalid option \"{name}\""),
                    hint: format!(
                        "Valid options in this context are: {}.",
                        CREDENTIAL_OPTIONS.join(", ")
                    ),
                });
            }
            if value.is_empty()
                || value.contains(['\n', '\r', '\0']) && *name != "service_account_key"
            {
                return Err(bad(
                    name,
                    "must be one line that is not empty",
                    "Leave it out instead, or copy it again.",
                ));
            }
        }
        let get = |name: &str| {
            options
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        let kinds = [
            ["access_key_id", "secret_access_key", "session_token"].as_slice(),
            ["service_account_key"].as_slice(),
            ["account_name", "account_key", "sas_token"].as_slice(),
        ];
        let used: Vec<usize> = (0..kinds.len())
            .filter(|&kind| options.iter().any(|(name, _)| kinds[kind].contains(name)))
            .collect();
        match used[..] {
            [] => Ok(Self::Chain),
            [0] => match (get("access_key_id"), get("secret_access_key")) {
                (Some(access_key_id), Some(secret_access_key)) => Ok(Self::S3 {
                    access_key_id,
                    secret_access_key,
                    session_token: get("session_token"),
                }),
                _ => Err(LakeError::InvalidOption {
                    message: "options \"access_key_id\" and \"secret_access_key\" must be given together"
                        .to_owned(),
                    hint: "Add the other one.".to_owned(),
                }),
            },
            [1] => Ok(Self::Google {
                service_account_key: get("service_account_key").unwrap_or_default(),
            }),
            [2] => {
                let secret = match (get("account_key"), get("sas_token")) {
                    (Some(_), Some(_)) => {
                        return Err(LakeError::InvalidOption {
                            message: "options \"account_key\" and \"sas_token\" exclude each other"
                                .to_owned(),
                            hint: "Give one of them.".to_owned(),
                        });
                    }
                    (Some(key), None) => AzureSecret::AccountKey(key),
                    (None, Some(token)) => AzureSecret::Sas(sas_pairs(&token)?),
                    (None, None) => AzureSecret::Chain,
                };
                Ok(Self::Azure {
                    account_name: get("account_name"),
                    secret,
                })
            }
            _ => Err(LakeError::InvalidOption {
                message: "the credentials are of more than one kind of storage".to_owned(),
                hint: "S3 takes access_key_id and secret_access_key, Google service_account_key, Azure account_name with account_key or sas_token."
                    .to_owned(),
            }),
        }
    }

    /// Refuses credentials of another cloud.
    pub(super) fn check_for(&self, cloud: Cloud) -> Result<(), LakeError> {
        let fits = matches!(
            (self, cloud),
            (Self::Chain, _)
                | (Self::S3 { .. }, Cloud::S3)
                | (Self::Google { .. }, Cloud::Google)
                | (Self::Azure { .. }, Cloud::Azure)
        );
        if fits {
            return Ok(());
        }
        Err(LakeError::InvalidOption {
            message: format!(
                "the credentials in the user mapping are not those of a storage of kind \"{}\"",
                cloud.scheme()
            ),
            hint: "S3 takes access_key_id and secret_access_key, Google service_account_key, Azure account_name with account_key or sas_token."
                .to_owned(),
        })
    }
}

/// The pairs of a shared access signature, decoded.
fn sas_pairs(token: &str) -> Result<Vec<(String, String)>, LakeError> {
    let malformed = || {
        bad(
            "sas_token",
            "is not a shared access signature",
            "It looks like sv=…&sp=…&sig=…, as the portal shows it.",
        )
    };
    let mut pairs = Vec::new();
    for pair in token.trim_start_matches('?').split('&') {
        let (name, value) = pair.split_once('=').ok_or_else(malformed)?;
        pairs.push((
            percent_decode(name).ok_or_else(malformed)?,
            percent_decode(value).ok_or_else(malformed)?,
        ));
    }
    Ok(pairs)
}

fn percent_decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
            let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
            out.push((high * 16 + low) as u8);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str, options: &[(&str, &str)]) -> Result<StorageOptions, LakeError> {
        StorageOptions::parse(&StorageUrl::parse(url).unwrap(), options)
    }

    #[test]
    fn options_are_checked() {
        let all = options(
            "s3://b",
            &[
                ("url", "s3://b"),
                ("region", "eu-central-1"),
                ("endpoint", "http://127.0.0.1:9000/"),
                ("allow_http", "on"),
                ("path_style", "true"),
                ("sse", "aws:kms"),
                ("sse_kms_key_id", "alias/x"),
                ("sse_bucket_key", "1"),
                ("ca_file", "/etc/ca.pem"),
            ],
        )
        .unwrap();
        assert_eq!(all.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        assert!(all.allow_http);
        for (url, given) in [
            ("s3://b", &[("nonsense", "x")][..]),
            ("s3://b", &[("region", "")]),
            ("s3://b", &[("region", "eu central")]),
            ("s3://b", &[("endpoint", "http://h")]),
            ("s3://b", &[("endpoint", "h:9000")]),
            ("s3://b", &[("endpoint", "https://key:hunter2@h")]),
            ("s3://b", &[("endpoint", "https://")]),
            ("s3://b", &[("allow_http", "perhaps")]),
            ("s3://b", &[("sse", "rot13")]),
            ("s3://b", &[("sse_kms_key_id", "k")]),
            ("s3://b", &[("sse", "AES256"), ("sse_kms_key_id", "k")]),
            ("s3://b", &[("ca_file", "ca.pem")]),
            ("gs://b", &[("sse", "AES256")]),
            ("az://b", &[("region", "x")]),
            ("file:///a", &[("region", "x")]),
        ] {
            let error = options(url, given).unwrap_err();
            assert_eq!(error.sqlstate(), "22023", "{given:?}");
            assert!(error.hint().is_some());
            assert!(!error.to_string().contains("hunter2"));
        }
    }

    #[test]
    fn credentials_are_checked_and_never_shown() {
        let s3 = Credentials::parse(&[("access_key_id", "a"), ("secret_access_key", "hunter2")]);
        assert!(!format!("{:?}", s3.as_ref().unwrap()).contains("hunter2"));
        assert!(s3.as_ref().unwrap().check_for(Cloud::S3).is_ok());
        assert_eq!(
            s3.unwrap().check_for(Cloud::Azure).unwrap_err().sqlstate(),
            "22023"
        );
        assert_eq!(Credentials::parse(&[]).unwrap(), Credentials::Chain);
        let sas = Credentials::parse(&[("account_name", "a"), ("sas_token", "?sv=1&sig=a%2Fb%3D")]);
        let Credentials::Azure {
            secret: AzureSecret::Sas(pairs),
            ..
        } = sas.unwrap()
        else {
            panic!("no signature")
        };
        assert_eq!(pairs[1], ("sig".to_owned(), "a/b=".to_owned()));
        for given in [
            &[("access_key_id", "hunter2")][..],
            &[("secret_access_key", "hunter2")],
            &[("session_token", "hunter2")],
            &[("access_key_id", "hunter2"), ("secret_access_key", "")],
            &[
                ("access_key_id", "hunter2\n"),
                ("secret_access_key", "hunter2"),
            ],
            &[("password", "hunter2")],
            &[("account_key", "hunter2"), ("sas_token", "sig=hunter2")],
            &[("sas_token", "hunter2")],
            &[("service_account_key", "hunter2"), ("account_name", "x")],
        ] {
            let error = Credentials::parse(given).unwrap_err();
            assert_eq!(error.sqlstate(), "22023");
            assert!(!format!("{error}{error:?}{:?}", error.hint()).contains("hunter2"));
        }
    }
}
