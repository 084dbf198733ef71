//! Event text: the one-pass scanner against the careful way, batches, and what events become: fields and columns.
use crate::{seed, split};
use arrow::array::AsArray;
use rakam_event::batch::{BatchBuilder, Layout};
use rakam_event::entry::{self, Limits};
use rakam_event::print::to_json_text;
use rakam_event::roads::{self, Roads, STAMP};
use rakam_event::testing::Random;
use rakam_event::types::FieldType;
use rakam_event::{discovery, extra, json, schema};

/// Between the events of one input.
const SEPARATOR: char = '\u{1e}';

/// Fields that there may be before the events come; the names are those of the generator of the tests.
const DECLARED: [(&str, FieldType); 16] = {
    use FieldType::*;
    [
        (
            "a",
            Numeric {
                precision: 9,
                scale: 3,
            },
        ),
        ("n", Int4),
        ("at", Uuid),
        ("b", Inet),
        ("tags", Float4),
        ("user_name", Jsonb),
        ("x_y", Timestamptz),
        ("c", Text),
        ("d", Int8),
        ("e", Float8),
        ("f", Bool),
        ("g", Date),
        ("h", BoolArray),
        ("i", Float8Array),
        ("j", TextArray),
        (
            "k",
            Numeric {
                precision: 38,
                scale: 38,
            },
        ),
    ]
};

pub fn run(input: &[u8]) {
    if let Some((choice, rest)) = split::<3>(input) {
        events(choice, &String::from_utf8_lossy(rest));
    }
}

fn events([first, second, limit]: [u8; 3], text: &str) {
    let limits = Limits {
        max_event_bytes: 1 << 20,
        max_string_bytes: if limit < 128 {
            usize::from(limit) + 4
        } else {
            1 << 16
        },
        max_fields: usize::from(limit % 32) + 4,
    };
    roads::batch(text, &limits);
    let _ = entry::check_row(text, &limits);

    let chosen = u16::from_be_bytes([first, second]);
    let declared: Vec<(String, FieldType)> = (0..16)
        .filter(|bit| chosen & 1 << bit != 0)
        .map(|bit| (DECLARED[bit].0.to_owned(), DECLARED[bit].1))
        .collect();
    let texts: Vec<&str> = text.split(SEPARATOR).collect();
    let mut walks = Roads::new(&["_id", "_extra", "user_name", "a", "n"]);
    for text in &texts {
        let good = roads::event(text);
        walks.walk(text);
        if good {
            let _ = entry::new_names(text, |name| name == "a");
        }
    }
    roads::columns(&declared, &texts, &limits);
    stored(&declared, &texts, &limits);
}

/// Rows as an INSERT may have them, `_extra` included: pushed or refused, printed, and taken apart again.
fn stored(declared: &[(String, FieldType)], texts: &[&str], limits: &Limits) {
    let dropped = schema::DroppedField {
        name: "gone".to_owned(),
        xid: STAMP.xid + 1,
        at_us: STAMP.received_at_us,
        own_since_us: i64::MIN,
    };
    let schema = roads::schema(true, declared).with_dropped(vec![dropped]);
    let mut builder = BatchBuilder::new(&schema, Layout::Stored, limits).unwrap();
    let mut discovery = discovery::Discovery::new(&schema, limits.max_fields);
    let mut good = 0;
    for text in texts {
        good += usize::from(builder.push(text, &STAMP).is_ok());
        discovery.observe(text, STAMP.xid, STAMP.received_at_us);
    }
    discovery.new_fields();
    let batch = builder.finish().unwrap().batch;
    assert_eq!(batch.num_rows(), good);
    let mut out = String::new();
    for (field, column) in schema.fields.iter().zip(batch.columns()) {
        for row in 0..good {
            out.clear();
            to_json_text(column, field.ty, row, &mut out).unwrap();
            json::check(&out, usize::MAX).unwrap();
        }
    }
    extra::properties(&batch, &schema.fields).unwrap();
    let column = |name| batch.column_by_name(name).unwrap();
    let stored = column(schema::EXTRA).as_string();
    let xid = column(schema::XID).as_primitive();
    let received_at = column(schema::RECEIVED_AT).as_primitive();
    extra::strip(stored, xid, received_at, &schema.dropped).unwrap();
}

pub fn seeds() -> Vec<Vec<u8>> {
    (0..200)
        .map(|n| {
            let mut random = Random(n);
            let count = 1 + random.next() % 3;
            let events: Vec<String> = (0..count).map(|_| random.object(0, 6)).collect();
            let text = if n % 4 == 0 {
                let item = |event| format!("{{\"collection\":\"c\",\"properties\":{event}}}");
                format!(
                    "[{}]",
                    events.iter().map(item).collect::<Vec<_>>().join(",")
                )
            } else {
                events.join(&SEPARATOR.to_string())
            };
            let text = if n % 5 == 0 {
                random.mangled(&text)
            } else {
                text
            };
            let choice = random.next().to_be_bytes();
            seed(&choice[..3], text.as_bytes())
        })
        .collect()
}
