//! A block of an object as a file.
//!
//! Layout: magic `RKB1`; length of the header (u32 LE); XXH64 of the rest of the header; size of the object, number of
//! the block, length of the payload (u64 LE each); length of the key (u32 LE) and the key; XXH64 of each [`CELL_BYTES`]
//! of the payload. Then the payload. A part of a block is read and checked without the rest.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use twox_hash::XxHash64;

const MAGIC: [u8; 4] = *b"RKB1";
/// Magic, length and checksum of the header.
const FRONT: usize = 16;
/// Size of the object, number of the block, length of the payload, length of the key.
const FIXED: usize = 28;
/// What has a checksum of its own.
const CELL_BYTES: usize = 64 << 10;
/// Nearly every header is read at once.
const FIRST_READ: usize = 1024;
/// Names of objects are far shorter.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// What a block file is asked for.
pub(super) struct Wanted<'a> {
    pub key: &'a [u8],
    pub object_bytes: u64,
    pub number: u64,
    /// Bytes there must be in the block.
    pub payload_bytes: usize,
}

fn cells(payload_bytes: usize) -> usize {
    payload_bytes.div_ceil(CELL_BYTES)
}

/// The file's bytes before the payload.
pub(super) fn header(wanted: &Wanted<'_>, payload: &[u8]) -> Vec<u8> {
    let mut header =
        Vec::with_capacity(FRONT + FIXED + wanted.key.len() + 8 * cells(payload.len()));
    header.resize(FRONT, 0);
    header.extend_from_slice(&wanted.object_bytes.to_le_bytes());
    header.extend_from_slice(&wanted.number.to_le_bytes());
    header.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    header.extend_from_slice(&(wanted.key.len() as u32).to_le_bytes());
    header.extend_from_slice(wanted.key);
    for cell in payload.chunks(CELL_BYTES) {
        header.extend_from_slice(&XxHash64::oneshot(0, cell).to_le_bytes());
    }
    let (length, checksum) = (header.len() as u32, XxHash64::oneshot(0, &header[FRONT..]));
    header[..4].copy_from_slice(&MAGIC);
    header[4..8].copy_from_slice(&length.to_le_bytes());
    header[8..FRONT].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// At least the wanted bytes of the payload, with the place of the first of them. An error of kind
/// [`io::ErrorKind::InvalidData`]: the file is not this block, whole and unharmed.
pub(super) fn read(
    file: &File,
    wanted: &Wanted<'_>,
    range: Range<usize>,
) -> io::Result<(usize, Bytes)> {
    let length = FRONT + FIXED + wanted.key.len() + 8 * cells(wanted.payload_bytes);
    if length > HEADER_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // A header of another length is not of this block.
    let mut front = vec![0; length.max(FIRST_READ.min(length + wanted.payload_bytes))];
    file.read_exact_at(&mut front, 0).map_err(damaged)?;
    let sums = checksums(&front[..length], wanted)?;
    let first = range.start / CELL_BYTES;
    let start = first * CELL_BYTES;
    let end = range
        .end
        .next_multiple_of(CELL_BYTES)
        .min(wanted.payload_bytes);
    let mut payload = vec![0; end - start];
    file.read_exact_at(&mut payload, (length + start) as u64)
        .map_err(damaged)?;
    for (cell, sum) in payload
        .chunks(CELL_BYTES)
        .zip(sums.chunks_exact(8).skip(first))
    {
        if *sum != XxHash64::oneshot(0, cell).to_le_bytes() {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok((start, payload.into()))
}

/// The checksums of the cells, out of a header that is the wanted block's.
fn checksums<'a>(header: &'a [u8], wanted: &Wanted<'_>) -> io::Result<&'a [u8]> {
    let mut expected = Vec::with_capacity(FIXED + wanted.key.len());
    expected.extend_from_slice(&wanted.object_bytes.to_le_bytes());
    expected.extend_from_slice(&wanted.number.to_le_bytes());
    expected.extend_from_slice(&(wanted.payload_bytes as u64).to_le_bytes());
    expected.extend_from_slice(&(wanted.key.len() as u32).to_le_bytes());
    expected.extend_from_slice(wanted.key);
    let (front, rest) = header.split_at(FRONT);
    let valid = front[..4] == MAGIC
        && front[4..8] == (header.len() as u32).to_le_bytes()
        && front[8..] == XxHash64::oneshot(0, rest).to_le_bytes()
        && rest.starts_with(&expected);
    if valid {
        Ok(&rest[expected.len()..])
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// A file that ends too early is harmed like one with wrong bytes.
fn damaged(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::ErrorKind::InvalidData.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn sample(payload: &[u8]) -> (Wanted<'static>, Vec<u8>) {
        let wanted = Wanted {
            key: b"lake\0a/b.parquet",
            object_bytes: 5_000_000,
            number: 3,
            payload_bytes: payload.len(),
        };
        let mut bytes = header(&wanted, payload);
        bytes.extend_from_slice(payload);
        (wanted, bytes)
    }

    #[test]
    fn parts_are_read_and_checked() {
        let payload: Vec<u8> = (0..200_000_u32).map(|i| (i * 7 % 251) as u8).collect();
        let (wanted, bytes) = sample(&payload);
        let file = file(&bytes);
        for range in [
            0..1,
            65_535..65_537,
            131_072..200_000,
            199_999..200_000,
            0..200_000,
        ] {
            let (start, read) = read(&file, &wanted, range.clone()).unwrap();
            assert!(start <= range.start);
            let (from, to) = (range.start - start, range.end - start);
            assert_eq!(&read[from..to], &payload[range]);
        }
    }

    #[test]
    fn harm_is_seen_where_it_matters() {
        let payload = vec![5; 150_000];
        let (wanted, bytes) = sample(&payload);
        let header_bytes = bytes.len() - payload.len();
        let invalid = |bytes: &[u8], wanted: &Wanted<'_>, range: Range<usize>| {
            read(&file(bytes), wanted, range).unwrap_err().kind() == io::ErrorKind::InvalidData
        };
        for at in (0..header_bytes).chain([header_bytes, header_bytes + 70_000, bytes.len() - 1]) {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            assert!(invalid(&bad, &wanted, 0..payload.len()), "{at}");
        }
        for length in [0, 5, 100, header_bytes, bytes.len() - 1] {
            assert!(invalid(&bytes[..length], &wanted, 0..payload.len()));
        }
        for other in [
            Wanted {
                key: b"lake\0a/c.parquet",
                ..wanted
            },
            Wanted {
                object_bytes: 5_000_001,
                ..wanted
            },
            Wanted {
                number: 2,
                ..wanted
            },
            Wanted {
                payload_bytes: 149_999,
                ..wanted
            },
        ] {
            assert!(invalid(&bytes, &other, 0..10));
        }
        // What is not asked for is not looked at.
        let mut bad = bytes.clone();
        bad[header_bytes + 140_000] ^= 1;
        assert!(read(&file(&bad), &wanted, 0..65_536).is_ok());
    }
}
