//! What a storage says about itself beside its data files, so that a catalogue can be made of the storage alone:
//! which projects, collections and fields there are, which files count, and which of their rows are deleted.
//!
//! Two kinds of objects below [`PREFIX`], in a folder for each writer, all of them written once and never changed. A *log*
//! has what changed since the log before it, as it is now; a *state* has everything. Both are lines of JSON: a [`Header`],
//! [`Record`]s, and a last line with their number and checksum. Each record says all there is to say of one thing, so
//! it does no harm if a log is applied to a state that is newer, or applied twice: a state need not be of one instant, and a
//! log whose answer was lost is written again under another name.
//!
//! Files that came after the last log are taken by what they say themselves ([`State::settle`]).

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use twox_hash::XxHash64;
use uuid::Uuid;

use crate::error::LakeError;
use crate::file_info::FileInfo;
use crate::period::object_id;
use crate::rows::RowSet;

mod settle;

/// Below it lie the descriptions of a storage, and nothing else does.
pub const PREFIX: &str = "_rakam/description/";
const FORMAT: u32 = 1;
const WHAT: &str = "description of the storage";

/// The name of an object of a description.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// Whose it is: a mark of the database that wrote it.
    pub writer: String,
    /// Counts logs. A state has everything up to the log of its number.
    pub number: u64,
    pub id: Uuid,
    /// None: a log. Else a part of a state.
    pub part: Option<u32>,
}

impl Name {
    pub fn path(&self) -> String {
        let Self {
            writer,
            number,
            id,
            part,
        } = self;
        match part {
            None => format!("{PREFIX}{writer}/{number:012}.{id}.log"),
            Some(part) => format!("{PREFIX}{writer}/{number:012}.{id}.{part:05}.state"),
        }
    }

    /// None: the path is not of a description.
    pub fn parse(path: &str) -> Option<Self> {
        let (writer, name) = path.strip_prefix(PREFIX)?.split_once('/')?;
        let (number, rest) = name.split_once('.')?;
        let (id, rest) = rest.split_once('.')?;
        let part = match rest.strip_suffix(".state") {
            Some(part) => Some(part.parse().ok()?),
            None if rest == "log" => None,
            None => return None,
        };
        Some(Self {
            writer: writer.to_owned(),
            number: number.parse().ok()?,
            id: id.parse().ok()?,
            part,
        })
    }
}

/// The first line of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    /// The database, as CREATE EXTENSION named it.
    pub installation: String,
    /// When this was read from the catalogue, in microseconds since 1970.
    pub at_us: i64,
    /// Ids from here on were not used yet.
    pub next_project_id: i32,
    pub next_collection_id: i32,
}

impl Header {
    pub fn new(installation: String, at_us: i64, next_ids: (i32, i32)) -> Self {
        Self {
            format: FORMAT,
            installation,
            at_us,
            next_project_id: next_ids.0,
            next_collection_id: next_ids.1,
        }
    }
}

/// What is said of one thing. Rows are those of the catalogue, by the names of its columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Record {
    Project {
        project_id: i32,
        /// None: there is none of this id any more, nor collections of it.
        row: Option<Map<String, Value>>,
    },
    Collection {
        collection_id: i32,
        project_id: i32,
        row: Option<Map<String, Value>>,
        #[serde(default)]
        fields: Vec<Map<String, Value>>,
        #[serde(default)]
        dropped_fields: Vec<Map<String, Value>>,
    },
    File {
        path: String,
        collection_id: i32,
        /// None: the file does not count (any more), whatever it says itself.
        file: Option<File>,
    },
}

/// A file of the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    pub n: u64,
    pub bytes: u64,
    /// How often its events were put together with others.
    #[serde(default)]
    pub level: i16,
    /// Rows that are deleted, as [`RowSet`] encodes them, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<String>,
}

impl File {
    /// The rows that are deleted. Errors: XX001.
    pub fn hidden(&self) -> Result<Option<RowSet>, LakeError> {
        let Some(text) = &self.hidden else {
            return Ok(None);
        };
        let digits = |pair: &[u8]| {
            let pair = std::str::from_utf8(pair).ok()?;
            u8::from_str_radix(pair, 16).ok()
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(digits).collect();
        let bytes = bytes.ok_or_else(|| LakeError::corrupt(WHAT, "malformed row numbers"))?;
        RowSet::decode(Bytes::from(bytes), self.n).map(Some)
    }
}

/// The last line of an object.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct End {
    records: u64,
    /// XXH64 of the lines before, in hexadecimal.
    checksum: String,
}

/// Writes an object of a description.
#[derive(Debug)]
pub struct Writer {
    text: Vec<u8>,
    records: u64,
}

impl Writer {
    pub fn new(header: &Header) -> Result<Self, LakeError> {
        let mut writer = Self {
            text: Vec::new(),
            records: 0,
        };
        writer.line(header)?;
        Ok(writer)
    }

    pub fn add(&mut self, record: &Record) -> Result<(), LakeError> {
        self.records += 1;
        self.line(record)
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    pub fn finish(mut self) -> Result<Bytes, LakeError> {
        let end = End {
            records: self.records,
            checksum: checksum(&self.text),
        };
        self.line(&end)?;
        Ok(self.text.into())
    }

    fn line(&mut self, line: &impl Serialize) -> Result<(), LakeError> {
        serde_json::to_writer(&mut self.text, line).map_err(|e| LakeError::Encode {
            what: WHAT,
            reason: e.to_string(),
        })?;
        self.text.push(b'\n');
        Ok(())
    }
}

fn checksum(text: &[u8]) -> String {
    format!("{:016x}", XxHash64::oneshot(0, text))
}

/// Reads what [`Writer`] wrote. Errors: XX001.
pub fn read(object: &[u8]) -> Result<(Header, Vec<Record>), LakeError> {
    let corrupt = |reason: &str| LakeError::corrupt(WHAT, reason.to_owned());
    let body = object
        .strip_suffix(b"\n")
        .and_then(|text| text.iter().rposition(|b| *b == b'\n'))
        .map(|newline| newline + 1)
        .ok_or_else(|| corrupt("it is cut off"))?;
    let end: End = serde_json::from_slice(&object[body..]).map_err(|_| corrupt("it is cut off"))?;
    if end.checksum != checksum(&object[..body]) {
        return Err(corrupt("its checksum is another"));
    }
    let mut lines = object[..body]
        .split(|b| *b == b'\n')
        .filter(|line| !line.is_empty());
    let header: Header = lines
        .next()
        .and_then(|line| serde_json::from_slice(line).ok())
        .ok_or_else(|| corrupt("it has no header"))?;
    if header.format != FORMAT {
        return Err(corrupt("it is of an unknown format"));
    }
    let records: Result<Vec<Record>, _> = lines.map(serde_json::from_slice).collect();
    let records = records.map_err(|e| LakeError::corrupt(WHAT, e))?;
    if records.len() as u64 != end.records {
        return Err(corrupt("records are missing"));
    }
    Ok((header, records))
}

/// Which objects tell all that one writer knew, in the order in which they are to be applied. None: there is no whole
/// state of this writer.
pub fn chain<'a>(names: &'a [Name], writer: &str) -> Option<Vec<&'a Name>> {
    let own: Vec<&Name> = names.iter().filter(|name| name.writer == writer).collect();
    let mut parts: BTreeMap<(u64, Uuid), Vec<&Name>> = BTreeMap::new();
    for name in own.iter().filter(|name| name.part.is_some()) {
        parts.entry((name.number, name.id)).or_default().push(name);
    }
    let (&(number, _), state) = parts.iter().rev().find(|(_, parts)| is_whole(parts))?;
    let mut chain = state.clone();
    chain.sort_by_key(|name| name.part);
    let mut logs: Vec<&Name> = (own.into_iter())
        .filter(|name| name.part.is_none() && name.number > number)
        .collect();
    logs.sort_by_key(|name| (name.number, name.id));
    chain.extend(logs);
    Some(chain)
}

/// The number of the part that closes a state, written behind the others: without it the state was cut off.
pub const LAST_PART: u32 = 99_999;

fn is_whole(parts: &[&Name]) -> bool {
    let mut numbers: Vec<u32> = parts.iter().filter_map(|name| name.part).collect();
    numbers.sort_unstable();
    numbers.pop() == Some(LAST_PART) && numbers.iter().zip(0..).all(|(part, n)| *part == n)
}

/// Whether a log between two others is missing.
pub fn has_gap(chain: &[&Name]) -> bool {
    let numbers: Vec<u64> = chain.iter().map(|name| name.number).collect();
    numbers.windows(2).any(|pair| pair[1] > pair[0] + 1)
}

/// A collection as the description has it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Collection {
    pub project_id: i32,
    pub row: Map<String, Value>,
    pub fields: Vec<Map<String, Value>>,
    pub dropped_fields: Vec<Map<String, Value>>,
}

/// Which collection a file is of, and what the description says of it; None: it came later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveFile {
    pub collection_id: i32,
    pub described: Option<File>,
}

/// What there is, by the descriptions read so far. About 300 bytes for each file.
#[derive(Debug, Default)]
pub struct State {
    /// Of the newest object.
    pub header: Option<Header>,
    pub projects: BTreeMap<i32, Map<String, Value>>,
    pub collections: BTreeMap<i32, Collection>,
    pub files: HashMap<String, LiveFile>,
    gone: HashSet<String>,
}

impl State {
    /// Takes in an object; those of a writer in the order of [`chain`].
    pub fn apply(&mut self, object: &[u8]) -> Result<(), LakeError> {
        let (header, records) = read(object)?;
        if self
            .header
            .as_ref()
            .is_none_or(|known| known.at_us <= header.at_us)
        {
            self.header = Some(header);
        }
        for record in records {
            self.take(record);
        }
        Ok(())
    }

    fn take(&mut self, record: Record) {
        match record {
            Record::Project {
                project_id,
                row: Some(row),
            } => {
                self.projects.insert(project_id, row);
            }
            Record::Project {
                project_id,
                row: None,
            } => {
                self.projects.remove(&project_id);
                self.collections
                    .retain(|_, collection| collection.project_id != project_id);
            }
            Record::Collection {
                collection_id,
                row: None,
                ..
            } => {
                self.collections.remove(&collection_id);
            }
            Record::Collection {
                collection_id,
                project_id,
                row: Some(row),
                fields,
                dropped_fields,
            } => {
                let collection = Collection {
                    project_id,
                    row,
                    fields,
                    dropped_fields,
                };
                self.collections.insert(collection_id, collection);
            }
            Record::File {
                path, file: None, ..
            } => {
                self.files.remove(&path);
                self.gone.insert(path);
            }
            Record::File {
                path,
                collection_id,
                file,
            } => {
                self.gone.remove(&path);
                let described = LiveFile {
                    collection_id,
                    described: file,
                };
                self.files.insert(path, described);
            }
        }
    }

    /// Drops what belongs to nothing: files of dropped collections, collections of dropped projects.
    fn tidy(&mut self) {
        let projects = &self.projects;
        (self.collections).retain(|_, collection| projects.contains_key(&collection.project_id));
        let collections = &self.collections;
        (self.files).retain(|_, file| collections.contains_key(&file.collection_id));
    }
}

#[cfg(test)]
mod tests;
