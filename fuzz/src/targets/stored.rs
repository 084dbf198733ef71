//! Everything that is decoded from bytes that lie in Postgres or in a storage: chunks, row chunks, footers, statistics,
//! runs and filters of ids, sets of deleted rows, data files. The checksum is right; what is behind it is arbitrary.
use std::sync::LazyLock;

use crate::{checksum, seal, seed, split};
use bytes::Bytes;
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;
use rakam_lake::chunk::{self, ChunkFormat};
use rakam_lake::describe::{self, Header, Name, Record, State};
use rakam_lake::id_filter::Filter;
use rakam_lake::id_run::{self, IdEntry, Ids, Node};
use rakam_lake::prune::{CmpOp, Predicate, may_match};
use rakam_lake::read::FileReader;
use rakam_lake::row_chunk::{Origin, Rows, Rules};
use rakam_lake::rows::{RowBits, RowSet};
use rakam_lake::scalar::Scalar;
use rakam_lake::testing::{self, Rng};
use rakam_lake::{footer, id_filter, stats};

/// Magic and checksum, which a seed is without.
const SEAL: usize = 12;

/// A field of each type, and one that no chunk has yet.
static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let mut schema = testing::all_types();
    let mut newer = schema.fields.last().unwrap().clone();
    newer.id += 1;
    newer.name = "newer".to_owned();
    newer.ty = FieldType::Int8;
    schema.fields.push(newer);
    schema
});

pub fn run(input: &[u8]) {
    if let Some(([kind, more], payload)) = split(input) {
        match kind % 9 {
            0 => chunk(payload),
            1 => row_chunk(payload),
            2 => statistics(payload),
            3 => drop(footer::parse_footer(seal(b"RKF1", payload))),
            4 => ids(payload, more),
            5 => filter(payload, more),
            6 => row_set(payload, more),
            7 => data_file(payload),
            _ => description(payload),
        };
    }
}

fn chunk(payload: &[u8]) {
    let sealed = seal(b"RKC2", payload);
    let _ = chunk::schema_version(sealed.clone());
    let _ = chunk::decode_projected(sealed.clone(), &[9, 16, 1, 16, 99]);
    if let Ok(batch) = chunk::decode(sealed.clone()) {
        let _ = chunk::info(&batch);
    }
    if let Ok(batch) = chunk::read(ChunkFormat::Arrow, sealed, &SCHEMA) {
        assert_eq!(batch.schema(), SCHEMA.arrow());
    }
}

fn row_chunk(payload: &[u8]) {
    let sealed = seal(b"RKR1", payload);
    if let Ok(rows) = Rows::decode(sealed.clone()) {
        assert_eq!(rows.iter().count(), rows.len());
        assert_eq!(Rows::decode(rows.encode(1).unwrap().into()).unwrap(), rows);
        if let Ok(batch) = chunk::read(ChunkFormat::Rows, sealed, &SCHEMA) {
            assert_eq!(batch.num_rows(), rows.len());
        }
    }
}

fn statistics(payload: &[u8]) {
    let Ok(found) = stats::decode(&seal(b"RKS1", payload)) else {
        return;
    };
    assert_eq!(stats::decode(&stats::encode(&found)).unwrap(), found);
    let scalars = [
        Scalar::Bool(true),
        Scalar::Int8(7),
        Scalar::Float8(f64::NAN),
        Scalar::Numeric {
            unscaled: i128::MAX,
            scale: 38,
        },
        Scalar::Text("b".to_owned()),
        Scalar::Date(0),
        Scalar::Timestamptz(0),
        Scalar::Uuid([0; 16]),
    ];
    for stat in &found {
        for field in &SCHEMA.fields {
            may_match(Some(stat), 10, field.ty, &Predicate::IsNull);
            may_match(Some(stat), 10, field.ty, &Predicate::In(scalars.to_vec()));
            for scalar in &scalars {
                for op in [CmpOp::Eq, CmpOp::Ne, CmpOp::Lt, CmpOp::Ge] {
                    let predicate = Predicate::Cmp(op, scalar.clone());
                    may_match(Some(stat), 10, field.ty, &predicate);
                }
            }
        }
    }
}

fn ids(payload: &[u8], more: u8) {
    let base = [0, i64::MIN, i64::MAX, 1 << 50][usize::from(more % 4)];
    let Ok(ids) = Ids::open(seal(b"RKI1", payload), base) else {
        return;
    };
    let entries: Vec<IdEntry> = ids.iter().collect();
    assert_eq!(entries.len(), ids.len());
    let node = Node {
        depth: more,
        first: u64::from(more),
    };
    for entry in entries.iter().take(64) {
        let range = id_run::neighbourhood(node, ids.len(), entry.hash);
        ids.is_conclusive(&range, ids.len(), entry.hash);
        ids.of_hash(entry.hash).count();
    }
    id_run::lay_out(&entries, more);
    let sorted = entries.windows(2).all(|pair| pair[0] <= pair[1]);
    if sorted && base == 0 {
        assert_eq!(&id_run::encode(&entries, 0).unwrap()[SEAL..], payload);
    }
}

fn filter(payload: &[u8], more: u8) {
    let node = Node {
        depth: more,
        first: u64::from(more) << 56,
    };
    for n in [usize::from(more), payload.len() / 32 * 21] {
        if let Ok(filter) = Filter::open(seal(b"RKB1", payload), node, n) {
            for hash in [0, u128::MAX, 1 << 100] {
                filter.may_have(hash);
            }
        }
    }
}

fn row_set(payload: &[u8], more: u8) {
    let n = [1000, u64::from(u32::MAX), u64::MAX, 0][usize::from(more % 4)];
    let Ok(set) = RowSet::decode(seal(b"RKD1", payload), n) else {
        return;
    };
    assert!(set.len() <= n);
    assert_eq!(RowSet::decode(set.encode().into(), n).unwrap(), set);
    assert_eq!(set.union(&set), set);
    let inside: u64 = set
        .within(10..500)
        .map(|run| u64::from(run.end - run.start))
        .sum();
    assert!(inside <= set.len());
    if set.runs().last().is_some_and(|run| run.end <= 1 << 16) {
        let mut bits = RowBits::new(1 << 16);
        for row in set.runs().iter().flat_map(Clone::clone) {
            assert!(bits.insert(row));
        }
        assert_eq!(bits.finish(), set);
    }
}

fn data_file(payload: &[u8]) {
    let Ok(reader) = FileReader::open(Bytes::copy_from_slice(payload), &SCHEMA, 1, 1000) else {
        return;
    };
    for batch in reader.take(100) {
        if batch.is_err() {
            return;
        }
    }
}

fn description(payload: &[u8]) {
    // The last line, with number and checksum of the others, is right.
    let text = [payload, b"\n"].concat();
    let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let records = lines.count().saturating_sub(1);
    let checksum = u64::from_le_bytes(checksum(&text));
    let end = format!(r#"{{"records":{records},"checksum":"{checksum:016x}"}}"#);
    let object = [&text[..], end.as_bytes(), b"\n"].concat();
    if let Ok((_, records)) = describe::read(&object) {
        for record in records {
            if let Record::File {
                file: Some(file), ..
            } = record
            {
                let _ = file.hidden();
            }
        }
    }
    let _ = State::default().apply(&object);
    if let Ok(path) = std::str::from_utf8(payload)
        && let Some(name) = Name::parse(path)
    {
        assert_eq!(Name::parse(&name.path()), Some(name));
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let schema = testing::all_types();
    let mut seeds = Vec::new();
    for n in [1, 3, 40] {
        let batch = testing::batch(&schema, n, &mut Rng::new(n as u64));
        seeds.push(seed(&[0, 0], &chunk::encode(&batch, 1).unwrap()[SEAL..]));

        let mut rows = Rows::default();
        for k in 0..n as i64 {
            let rules = Rules {
                time_past_us: k,
                time_future_us: 5,
                max_string_bytes: 100,
            };
            let origin = Origin {
                received_at_us: 1_700_000_000_000_000 + k,
                shift_us: -k,
                xid: 7,
                rules,
            };
            rows.push(&format!(r#"{{"n":{k},"newer":"{k}","text":"é"}}"#), origin);
        }
        seeds.push(seed(&[1, 0], &rows.encode(1).unwrap()[SEAL..]));

        let file = testing::file(n, n as u64);
        seeds.push(seed(&[2, 0], &stats::encode(&file.stats)[SEAL..]));
        seeds.push(seed(&[3, 0], &file.footer[SEAL..]));
        seeds.push(seed(&[7, 0], &file.sink));

        let entry = |k| IdEntry {
            hash: id_run::hash(1, &format!("{k}")),
            received_us: k,
        };
        let mut entries: Vec<IdEntry> = (0..n as i64).map(entry).collect();
        entries.sort_unstable();
        seeds.push(seed(&[4, 0], &id_run::encode(&entries, 0).unwrap()[SEAL..]));
        seeds.push(seed(
            &[5, n as u8],
            &id_filter::build(Node::ROOT, &entries)[SEAL..],
        ));

        let mut bits = RowBits::new(1000);
        for row in 0..n as u32 {
            bits.insert(row * 7 % 1000);
        }
        seeds.push(seed(&[6, 0], &bits.finish().encode()[SEAL..]));
    }
    let header = Header::new("here".to_owned(), 1, (2, 3));
    let writer = describe::Writer::new(&header).unwrap();
    let object = writer.finish().unwrap();
    let mut text = object.split(|b| *b == b'\n').next().unwrap().to_vec();
    text.extend(br#"
{"what":"project","project_id":1,"row":{"name":"acme"}}
{"what":"collection","collection_id":2,"project_id":1,"row":{"name":"a"},"fields":[{"id":16}]}
{"what":"file","path":"acme/a/b.parquet","collection_id":2,"file":{"n":9,"bytes":8,"hidden":"524b4431"}}"#);
    seeds.push(seed(&[8, 0], &text));
    seeds
}
