//! The bytes of a file, decompressed, and how far they have been read.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::read::MultiGzDecoder;
use rakam_lake::cache::Memory;

use crate::error::FilesError;
use crate::format::Compression;
use crate::locate::{Found, Location};
use crate::object::Stop;

const BUFFER_BYTES: usize = 256 << 10;
/// The decompressor may keep this much of what it wrote, as log2: what `zstd` itself accepts without being told.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Between who reads a file and who waits for it: bytes read of the file itself, for progress, whether anybody does wait
/// any more, and whose memory it is. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Meter {
    bytes: Arc<AtomicU64>,
    stop: Option<Stop>,
    memory: Option<Arc<dyn Memory>>,
}

impl Meter {
    /// Of a file whose reading ends when it is told to.
    pub fn of(stop: &Stop) -> Self {
        Self {
            stop: Some(stop.clone()),
            ..Self::default()
        }
    }

    /// What a file takes beyond what every file needs is taken of this.
    pub fn with_memory(mut self, memory: Arc<dyn Memory>) -> Self {
        self.memory = Some(memory);
        self
    }

    pub(crate) fn memory(&self) -> Option<Arc<dyn Memory>> {
        self.memory.clone()
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub fn set(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    fn go_on(&self) -> io::Result<()> {
        match &self.stop {
            Some(stop) if stop.is_stopped() => Err(io::Error::other(FilesError::Cancelled)),
            _ => Ok(()),
        }
    }
}

struct Counting {
    file: Box<dyn Read + Send>,
    read: Meter,
}

impl Read for Counting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read.go_on()?;
        let n = self.file.read(buffer)?;
        self.read.bytes.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Decompressed bytes, which may be many times those of the file: who passes over them looks up, too.
struct Plain {
    decoder: Box<dyn Read + Send>,
    read: Meter,
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read.go_on()?;
        self.decoder.read(buffer)
    }
}

/// Opens a file for reading from a position of its decompressed bytes.
pub fn open(file: &Found, from: u64, read: &Meter) -> Result<Box<dyn Read + Send>, FilesError> {
    let name = &file.name;
    let compression = Compression::of_name(name);
    let failed = |e: io::Error| FilesError::io("open", name, &e);
    let start = match compression {
        Compression::None => from,
        _ => 0,
    };
    let file: Box<dyn Read + Send> = match &file.at {
        Location::File(path) => {
            let mut file = File::open(path).map_err(failed)?;
            if start > 0 {
                file.seek(SeekFrom::Start(start)).map_err(failed)?;
            }
            Box::new(file)
        }
        Location::Object(object) => Box::new(object.open()?.reader(start)),
    };
    read.set(start);
    let file = Counting {
        file,
        read: read.clone(),
    };
    let decoder: Box<dyn Read + Send> = match compression {
        Compression::None => return Ok(Box::new(file)),
        Compression::Gzip => Box::new(MultiGzDecoder::new(BufReader::with_capacity(
            BUFFER_BYTES,
            file,
        ))),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(file).map_err(failed)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(failed)?;
            Box::new(decoder)
        }
    };
    let mut plain = Plain {
        decoder,
        read: read.clone(),
    };
    if from > 0 {
        let skipped = io::copy(&mut plain.by_ref().take(from), &mut io::sink())
            .map_err(|e| FilesError::io("read", name, &e))?;
        if skipped < from {
            return Err(FilesError::io(
                "read",
                name,
                &io::ErrorKind::UnexpectedEof.into(),
            ));
        }
    }
    Ok(Box::new(plain))
}

/// A window over a stream of bytes, whose records are taken off its front.
pub struct Window {
    input: Box<dyn Read + Send>,
    name: String,
    buffer: Vec<u8>,
    start: usize,
    ended: bool,
}

impl Window {
    pub fn new(input: Box<dyn Read + Send>, name: &str) -> Self {
        Self {
            input,
            name: name.to_owned(),
            buffer: Vec::new(),
            start: 0,
            ended: false,
        }
    }

    /// What has been read and not been taken.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    /// Whether the stream has no more bytes than [`Self::bytes`].
    pub fn ended(&self) -> bool {
        self.ended
    }

    pub fn take(&mut self, n: usize) {
        self.start += n;
    }

    /// Reads more bytes behind those there are.
    pub fn fill(&mut self) -> Result<(), FilesError> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let length = self.buffer.len();
        self.buffer.resize(length + BUFFER_BYTES.max(length / 2), 0);
        let mut end = length;
        while end < self.buffer.len() {
            match self.input.read(&mut self.buffer[end..]) {
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => end += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.buffer.truncate(end);
                    return Err(FilesError::io("read", &self.name, &e));
                }
            }
        }
        self.buffer.truncate(end);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Options;
    use crate::source::{self, Position, Spec};
    use std::io::Write;

    #[test]
    fn a_position_counts_decompressed_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let text: Vec<u8> = (0..200_000u32)
            .flat_map(|i| format!("{i}\n").into_bytes())
            .collect();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("a"), &text).unwrap();
        // Two members, as appended logs have them.
        let (first, second) = text.split_at(text.len() / 3);
        let mut gz = Vec::new();
        for part in [first, second] {
            let mut encoder = flate2::write::GzEncoder::new(&mut gz, flate2::Compression::fast());
            encoder.write_all(part).unwrap();
            encoder.finish().unwrap();
        }
        std::fs::write(path("a.gz"), gz).unwrap();
        std::fs::write(path("a.zst"), zstd::encode_all(&text[..], 1).unwrap()).unwrap();
        for name in ["a", "a.gz", "a.zst"] {
            for from in [0, 1, 500_000] {
                let read = Meter::default();
                let input = open(&Found::file(path(name), name), from, &read).unwrap();
                let mut window = Window::new(input, name);
                let mut found = Vec::new();
                while !window.ended() {
                    window.fill().unwrap();
                    let n = window.bytes().len() / 2 + 1;
                    let n = n.min(window.bytes().len());
                    found.extend_from_slice(&window.bytes()[..n]);
                    window.take(n);
                }
                found.extend_from_slice(window.bytes());
                assert!(found == text[from as usize..], "{name} from {from}");
                assert_eq!(read.bytes(), std::fs::metadata(path(name)).unwrap().len());
            }
        }
        let beyond = Found::file(path("a.gz"), "a.gz");
        let beyond = open(&beyond, 1 << 40, &Meter::default());
        assert!(beyond.is_err());
    }

    #[test]
    fn nobody_reads_on_for_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        // One line without an end, which is passed over once it is too long.
        let line = vec![b'x'; 4 << 20];
        std::fs::write(path("a.ndjson"), &line).unwrap();
        let compressed = zstd::encode_all(&line[..], 1).unwrap();
        std::fs::write(path("a.ndjson.zst"), compressed).unwrap();
        let spec = Spec {
            format: None,
            options: Options::default(),
            max_record_bytes: 1 << 10,
        };
        for name in ["a.ndjson", "a.ndjson.zst"] {
            let file = Found::file(path(name), name);
            let stop = Stop::new();
            let meter = Meter::of(&stop);
            let mut source = source::open(&file, &spec, Position::default(), &meter).unwrap();
            stop.stop();
            assert_eq!(source.next().unwrap_err(), FilesError::Cancelled, "{name}");
            let from = Position {
                byte: 1 << 20,
                ..Position::default()
            };
            let opened = source::open(&file, &spec, from, &meter);
            let next = opened.and_then(|mut source| source.next());
            assert_eq!(next.unwrap_err(), FilesError::Cancelled, "{name}");
        }
    }
}
