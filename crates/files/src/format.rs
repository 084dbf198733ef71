//! What a file is: its format and compression, by name or by suffix, and the options of CSV.

use std::fmt;

use serde_json::Value;

use crate::error::FilesError;

/// A format of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Parquet,
    Csv,
    /// One JSON object a line.
    Ndjson,
    /// One array of JSON objects; a file that does not begin with `[` is read as [`Format::Ndjson`].
    Json,
    /// Avro's object container file.
    Avro,
}

impl Format {
    const ALL: [Self; 5] = [
        Self::Parquet,
        Self::Csv,
        Self::Ndjson,
        Self::Json,
        Self::Avro,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Csv => "csv",
            Self::Ndjson => "ndjson",
            Self::Json => "json",
            Self::Avro => "avro",
        }
    }

    /// The format of this name, in any case of its letters.
    pub fn parse(name: &str) -> Result<Self, FilesError> {
        let lower = name.to_ascii_lowercase();
        Self::ALL
            .into_iter()
            .find(|format| format.name() == lower)
            .ok_or_else(|| FilesError::Option {
                message: format!("unknown file format \"{name}\""),
                hint: format!("Formats are {}.", names()),
            })
    }

    /// The format that the end of a file's name tells, compression aside.
    pub fn of_name(name: &str) -> Result<Self, FilesError> {
        let lower = name.to_ascii_lowercase();
        let plain = Compression::of_name(&lower).strip(&lower);
        let suffix = plain.rsplit_once('.').map_or("", |(_, suffix)| suffix);
        Ok(match suffix {
            "parquet" | "pq" => Self::Parquet,
            "csv" | "tsv" => Self::Csv,
            "ndjson" | "jsonl" => Self::Ndjson,
            "json" => Self::Json,
            "avro" => Self::Avro,
            _ => {
                return Err(FilesError::Option {
                    message: format!("could not tell the format of \"{name}\" by its suffix"),
                    hint: format!("Give the argument format: {}.", names()),
                });
            }
        })
    }
}

fn names() -> String {
    Format::ALL.map(Format::name).join(", ")
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a whole file is compressed, by its suffix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    const SUFFIXES: [(&'static str, Self); 4] = [
        (".gz", Self::Gzip),
        (".gzip", Self::Gzip),
        (".zst", Self::Zstd),
        (".zstd", Self::Zstd),
    ];

    pub fn of_name(name: &str) -> Self {
        let lower = name.to_ascii_lowercase();
        Self::SUFFIXES
            .into_iter()
            .find(|(suffix, _)| lower.ends_with(suffix))
            .map_or(Self::None, |(_, compression)| compression)
    }

    /// The name without the suffix of this compression.
    fn strip(self, name: &str) -> &str {
        Self::SUFFIXES
            .into_iter()
            .filter(|(_, compression)| *compression == self)
            .find_map(|(suffix, _)| name.strip_suffix(suffix))
            .unwrap_or(name)
    }
}

/// How CSV is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CsvOptions {
    /// The first record holds the names of the columns; else they are `column_1`, `column_2` and so on.
    pub header: bool,
    pub delimiter: u8,
    /// What an unquoted cell says when it has no value.
    pub null: String,
    pub quote: u8,
    /// Before a quote inside of quotes.
    pub escape: u8,
}

impl CsvOptions {
    /// The defaults for a file of this name: a tab between the columns of `.tsv`.
    pub fn of_name(name: &str) -> Self {
        let lower = name.to_ascii_lowercase();
        let tabs = Compression::of_name(&lower).strip(&lower).ends_with(".tsv");
        Self {
            header: true,
            delimiter: if tabs { b'\t' } else { b',' },
            null: String::new(),
            quote: b'"',
            escape: b'"',
        }
    }
}

/// Options as given, checked; what is not given depends on the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    header: Option<bool>,
    delimiter: Option<u8>,
    null: Option<String>,
    quote: Option<u8>,
    escape: Option<u8>,
}

const VALID: &str = "Valid options are header, delimiter, null, quote and escape, for CSV.";

impl Options {
    /// Reads a JSON object of options; one that is null counts as not given.
    pub fn parse(text: &str) -> Result<Self, FilesError> {
        let wrong = |message: String| FilesError::Option {
            message,
            hint: VALID.to_owned(),
        };
        let Ok(Value::Object(entries)) = serde_json::from_str(text) else {
            return Err(wrong("options must be a JSON object".to_owned()));
        };
        let mut options = Self::default();
        for (key, value) in entries {
            if !["header", "delimiter", "null", "quote", "escape"].contains(&key.as_str()) {
                return Err(wrong(format!("unknown option \"{key}\"")));
            }
            if value.is_null() {
                continue;
            }
            let character = || match value.as_str().map(str::as_bytes) {
                Some(&[byte]) if byte.is_ascii() && !matches!(byte, b'\r' | b'\n' | 0) => Ok(byte),
                _ => Err(wrong(format!(
                    "option \"{key}\" must be a single one-byte character"
                ))),
            };
            match key.as_str() {
                "header" => {
                    let header = value.as_bool().ok_or_else(|| {
                        wrong("option \"header\" must be true or false".to_owned())
                    })?;
                    options.header = Some(header);
                }
                "delimiter" => options.delimiter = Some(character()?),
                "quote" => options.quote = Some(character()?),
                "escape" => options.escape = Some(character()?),
                _ => {
                    let null = value
                        .as_str()
                        .filter(|null| !null.contains(['\r', '\n']))
                        .ok_or_else(|| {
                            wrong("option \"null\" must be a text on one line".to_owned())
                        })?;
                    options.null = Some(null.to_owned());
                }
            }
        }
        Ok(options)
    }

    /// Refuses options of CSV for anything else.
    pub fn ensure_for(&self, format: Format) -> Result<(), FilesError> {
        if format == Format::Csv || *self == Self::default() {
            return Ok(());
        }
        Err(FilesError::Option {
            message: format!("format {format} has no options"),
            hint: VALID.to_owned(),
        })
    }

    /// What applies to a CSV file of this name.
    pub fn csv(&self, name: &str) -> Result<CsvOptions, FilesError> {
        let default = CsvOptions::of_name(name);
        let quote = self.quote.unwrap_or(default.quote);
        let csv = CsvOptions {
            header: self.header.unwrap_or(default.header),
            delimiter: self.delimiter.unwrap_or(default.delimiter),
            null: self.null.clone().unwrap_or(default.null),
            quote,
            // As for COPY: a quote is doubled unless another character is said to stand before it.
            escape: self.escape.unwrap_or(quote),
        };
        let wrong = |message: &str| {
            Err(FilesError::Option {
                message: message.to_owned(),
                hint: VALID.to_owned(),
            })
        };
        if csv.delimiter == csv.quote {
            return wrong("options \"delimiter\" and \"quote\" must differ");
        }
        if csv
            .null
            .bytes()
            .any(|b| b == csv.delimiter || b == csv.quote)
        {
            return wrong("option \"null\" must contain neither the delimiter nor the quote");
        }
        Ok(csv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_format_and_compression() {
        for (name, format, compression) in [
            ("a.parquet", Format::Parquet, Compression::None),
            ("dir.x/A.CSV.GZ", Format::Csv, Compression::Gzip),
            ("a.tsv.zst", Format::Csv, Compression::Zstd),
            ("a.jsonl", Format::Ndjson, Compression::None),
            ("a.ndjson.zstd", Format::Ndjson, Compression::Zstd),
            ("a.json.gzip", Format::Json, Compression::Gzip),
            ("a.b.avro", Format::Avro, Compression::None),
        ] {
            assert_eq!(Format::of_name(name), Ok(format), "{name}");
            assert_eq!(Compression::of_name(name), compression, "{name}");
        }
        for name in ["a", "csv", "a.gz", "a.txt", "a.csv.bz2", ""] {
            assert_eq!(
                Format::of_name(name).map_err(|e| e.sqlstate()),
                Err("22023"),
                "{name}"
            );
        }
        assert_eq!(Format::parse("Parquet"), Ok(Format::Parquet));
        assert!(Format::parse("orc").is_err_and(|e| e.hint().is_some_and(|h| h.contains("avro"))));
    }

    #[test]
    fn options_of_csv() {
        let csv = |text: &str| Options::parse(text).and_then(|o| o.csv("x.csv"));
        assert_eq!(csv("{}"), Ok(CsvOptions::of_name("x.csv")));
        assert_eq!(CsvOptions::of_name("x.tsv.gz").delimiter, b'\t');
        assert_eq!(
            csv(
                r#"{"header": false, "delimiter": ";", "null": "NA", "quote": "'", "escape": null}"#
            ),
            Ok(CsvOptions {
                header: false,
                delimiter: b';',
                null: "NA".to_owned(),
                quote: b'\'',
                escape: b'\'',
            })
        );
        for wrong in [
            "[]",
            "1",
            "x",
            r#"{"headr": true}"#,
            r#"{"header": "yes"}"#,
            r#"{"delimiter": ""}"#,
            r#"{"delimiter": "::"}"#,
            r#"{"delimiter": "ä"}"#,
            r#"{"quote": ","}"#,
            r#"{"escape": "\n"}"#,
            r#"{"null": "a,b"}"#,
            r#"{"null": 1}"#,
        ] {
            assert_eq!(
                csv(wrong).map_err(|e| e.sqlstate()),
                Err("22023"),
                "{wrong}"
            );
        }
        let some = Options::parse(r#"{"header": true}"#);
        assert!(some.is_ok_and(|o| o.ensure_for(Format::Avro).is_err()));
        assert_eq!(Options::default().ensure_for(Format::Avro), Ok(()));
    }
}
