//! Columns of files, and the files read as these columns.

use super::*;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, FixedSizeBinaryArray, Float64Array, Int16Array, Int64Array, RecordBatch, StringArray,
};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

use crate::format::Options;
use crate::locate;
use crate::table::read::{Known as Rowset, Pruner, Reader, parts};
use crate::table::value::{Form, Wanted};

fn spec() -> Spec {
    Spec {
        format: None,
        options: Options::default(),
        max_record_bytes: 1 << 20,
    }
}

fn columns(root: &Path) -> Result<Vec<(String, String)>, FilesError> {
    let files = locate::below(root, "data", true, None, &|| true)?;
    let threads = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let found = threads.block_on(infer(&files, &spec(), |_| ()))?;
    Ok(found
        .columns
        .into_iter()
        .map(|(name, ty)| (name, ty.to_string()))
        .collect())
}

/// Whole numbers in column 0 at or above `from` only.
struct From(i64);

impl Pruner for From {
    fn columns(&self) -> &[usize] {
        &[0]
    }

    fn may_match(&self, column: usize, known: &Rowset) -> bool {
        assert_eq!(column, 0);
        let max = known.max.as_ref();
        let max = max.map(|max| max.as_primitive::<arrow::datatypes::Int64Type>().value(0));
        known.nulls != Some(known.rows) && max.is_none_or(|max| max >= self.0)
    }
}

fn rows(root: &Path, wanted: &[(&str, Form)], from: i64) -> Result<Vec<String>, FilesError> {
    let wanted: Arc<[Wanted]> = wanted
        .iter()
        .map(|(name, form)| Wanted {
            name: (*name).to_owned(),
            form: *form,
        })
        .collect();
    let mut shown = Vec::new();
    for file in locate::below(root, "data", true, None, &|| true)? {
        for part in parts(&file, &spec(), 2)? {
            let meter = Meter::default();
            let mut reader = Reader::open(&part, &spec(), &wanted, &From(from), &meter)?;
            while let Some(batch) = reader.next_batch()? {
                let options = FormatOptions::new().with_null("NULL");
                let formatters: Vec<_> = batch
                    .columns()
                    .iter()
                    .map(|c| ArrayFormatter::try_new(c.as_ref(), &options).unwrap())
                    .collect();
                for row in 0..batch.num_rows() {
                    let cells: Vec<String> = formatters
                        .iter()
                        .map(|f| f.value(row).to_string())
                        .collect();
                    shown.push(cells.join("|"));
                }
            }
        }
    }
    Ok(shown)
}

fn write_parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(2))
        .build();
    let file = fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

const INT8: Form = Form::Field(FieldType::Int8);
const TEXT: Form = Form::Field(FieldType::Text);

#[test]
fn parquet_files_have_a_schema_together() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir_all(root.join("data/year=2024")).unwrap();
    fs::create_dir_all(root.join("data/year=2025")).unwrap();
    let small: ArrayRef = Arc::new(Int16Array::from(vec![1, 2, 3]));
    let wide: ArrayRef = Arc::new(Int64Array::from(vec![Some(10), None, Some(1 << 40)]));
    let text: ArrayRef = Arc::new(StringArray::from(vec!["x", "y", "z"]));
    let bytes: ArrayRef = Arc::new(
        FixedSizeBinaryArray::try_from_iter([[1_u8; 16], [2; 16], [3; 16]].into_iter()).unwrap(),
    );
    write_parquet(
        &root.join("data/year=2024/a.parquet"),
        vec![("n", small), ("User Name", text)],
    );
    write_parquet(
        &root.join("data/year=2025/b.parquet"),
        vec![("b", bytes), ("n", wide)],
    );
    let named = |columns: &[(&str, &str)]| {
        Ok(columns
            .iter()
            .map(|(n, t)| ((*n).to_owned(), (*t).to_owned()))
            .collect())
    };
    assert_eq!(
        columns(root),
        named(&[
            ("n", "bigint"),
            ("User Name", "text"),
            ("b", "bytea"),
            ("year", "bigint")
        ])
    );
    let wanted = [("n", INT8), ("User Name", TEXT), ("year", INT8)];
    assert_eq!(
        rows(root, &wanted, i64::MIN).unwrap(),
        [
            "1|x|2024",
            "2|y|2024",
            "3|z|2024",
            "10|NULL|2025",
            "NULL|NULL|2025",
            "1099511627776|NULL|2025"
        ]
    );
    // Row groups of two rows, by their statistics.
    assert_eq!(
        rows(root, &wanted, 3).unwrap(),
        [
            "3|z|2024",
            "10|NULL|2025",
            "NULL|NULL|2025",
            "1099511627776|NULL|2025"
        ]
    );
    assert_eq!(rows(root, &[("year", INT8)], 2025).unwrap().len(), 3);
    // A column that no file has is NULL everywhere.
    assert!(rows(root, &[("missing", INT8)], 0).unwrap().is_empty());

    let error = rows(root, &[("n", Form::SmallInt)], i64::MIN).unwrap_err();
    assert_eq!(error.sqlstate(), "22P02");
    let message = error.to_string();
    assert!(
        message.contains("b.parquet") && message.contains("line 3"),
        "{message}"
    );

    let float: ArrayRef = Arc::new(Float64Array::from(vec![0.5]));
    write_parquet(&root.join("data/c.parquet"), vec![("User Name", float)]);
    let error = columns(root).unwrap_err();
    assert_eq!(error.sqlstate(), "42804");
    assert!(error.to_string().contains("c.parquet"), "{error}");
}

#[test]
fn other_files_show_their_schema() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir_all(root.join("data")).unwrap();
    let write = |name: &str, text: &str| fs::write(root.join("data").join(name), text).unwrap();
    write(
        "a.csv",
        "id,Name,at,empty\n1,ann,2024-01-02,\n2,,2024-01-02 03:04:05Z,\n",
    );
    write("b.csv", "id,more\n9007199254740993,true\n0.5,\n");
    write(
        "c.ndjson",
        "{\"id\": 7, \"tags\": [\"a\", null], \"o\": {\"x\": 1}, \"Name\": 5}\n\n{\"id\": 1e3, \"o\": {}, \"big\": 1e40, \"no\": null}\n",
    );
    let shown = columns(root).unwrap();
    let shown: Vec<(&str, &str)> = shown
        .iter()
        .map(|(n, t)| (n.as_str(), t.as_str()))
        .collect();
    assert_eq!(
        shown,
        [
            ("id", "double precision"),
            ("Name", "text"),
            ("at", "timestamp with time zone"),
            ("empty", "text"),
            ("more", "boolean"),
            ("tags", "text[]"),
            ("o", "jsonb"),
            ("big", "numeric"),
            ("no", "text"),
        ]
    );
    let float = Form::Field(FieldType::Float8);
    let wanted = [
        ("id", float),
        ("Name", TEXT),
        ("o", Form::Field(FieldType::Jsonb)),
        ("more", Form::Literal),
    ];
    assert_eq!(
        rows(root, &wanted, 0).unwrap(),
        [
            "1.0|ann|NULL|NULL",
            "2.0|NULL|NULL|NULL",
            "9007199254740992.0|NULL|NULL|true",
            "0.5|NULL|NULL|NULL",
            "7.0|5|{\"x\":1}|NULL",
            "1000.0|NULL|{}|NULL",
        ]
    );
    let error = rows(root, &[("at", INT8)], 0).unwrap_err().to_string();
    assert!(
        error.contains("a.csv") && error.contains("line 2"),
        "{error}"
    );
    write("d.ndjson", "{\"id\": 1}\nnot json\n");
    let error = rows(root, &[("id", float)], 0).unwrap_err();
    assert_eq!(error.sqlstate(), "22P04");
    assert!(error.to_string().contains("d.ndjson"), "{error}");
    write("d.ndjson", "{\"id\": 1}\n");
    write("e.csv", "id,id\n1,2\n");
    assert_eq!(columns(root).unwrap_err().sqlstate(), "42701");
}

#[test]
fn a_sample_is_spread() {
    let files: Vec<Found> = (0..1000)
        .map(|n| Found::file(n.to_string(), &n.to_string()))
        .collect();
    let all: Vec<&Found> = files.iter().collect();
    let some = sample(&all);
    assert_eq!(some.len(), SAMPLE_FILES);
    assert_eq!(
        (&*some[0].name, &*some[SAMPLE_FILES - 1].name),
        ("0", "999")
    );
    assert_eq!(sample(&all[..3]).len(), 3);
}
