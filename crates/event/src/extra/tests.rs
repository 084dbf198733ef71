use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringArray};
use arrow::datatypes::{Float64Type, Schema as ArrowSchema};

use super::*;
use crate::types::FieldType;

fn field(id: i32, name: &str, ty: FieldType) -> Field {
    Field {
        id,
        name: name.to_owned(),
        ty,
        added_version: 1,
        column_ready: false,
    }
}

fn texts(array: &StringArray) -> Vec<Option<&str>> {
    array.iter().collect()
}

#[test]
fn promoted_values_are_coerced() -> Result<(), EventError> {
    let extra = StringArray::from(vec![
        Some(r#"{"price":"2.5","tags":"x"}"#),
        None,
        Some(r#"{"price":"much","tags":["a",null,1.0]}"#),
        Some(r#"{"nested":{"price":1},"tags":null}"#),
        Some(r#"["price"]"#),
        Some("{}"),
    ]);
    let price = field(16, "price", FieldType::Float8);
    let tags = field(17, "tags", FieldType::TextArray);
    let columns = promote(&extra, &[&price, &tags])?;
    let prices: Vec<_> = columns[0].as_primitive::<Float64Type>().iter().collect();
    assert_eq!(prices, [Some(2.5), None, None, None, None, None]);
    assert_eq!(columns[1].data_type(), tags.arrow().data_type());
    let items = columns[1].as_list::<i32>();
    assert_eq!(texts(items.value(0).as_string()), [Some("x")]);
    assert_eq!(
        texts(items.value(2).as_string()),
        [Some("a"), None, Some("1")]
    );
    assert_eq!((items.len(), items.null_count()), (6, 4));
    Ok(())
}

#[test]
fn extra_without_columns_and_with_pending_fields() -> Result<(), EventError> {
    let extra = StringArray::from(vec![
        Some(r#"{"price":"2.5","k\"":1}"#),
        Some(r#"{"price":"much"}"#),
        Some(r#"{"price":2.50}"#),
        Some(r#"{"other":[1.0]}"#),
        None,
        Some("{}"),
        Some("[1]"),
    ]);
    let price = field(16, "price", FieldType::Float8);
    let size = field(17, "size", FieldType::Float8);
    let dropped = merge_extra(&extra, &[&price], &[])?;
    assert_eq!(
        texts(&dropped),
        [
            Some(r#"{"k\"":1}"#),
            Some(r#"{"price":"much"}"#),
            None,
            Some(r#"{"other":[1.0]}"#),
            None,
            None,
            Some("[1]"),
        ]
    );
    let sizes: ArrayRef = Arc::new(Float64Array::from(vec![
        Some(1.0),
        None,
        Some(0.5),
        None,
        Some(7.0),
        None,
        Some(3.0),
    ]));
    let merged = merge_extra(&extra, &[&price], &[(&size, sizes)])?;
    assert_eq!(
        texts(&merged),
        [
            Some(r#"{"k\"":1,"size":1}"#),
            Some(r#"{"price":"much"}"#),
            Some(r#"{"size":0.5}"#),
            Some(r#"{"other":[1.0]}"#),
            Some(r#"{"size":7}"#),
            None,
            Some(r#"{"_extra":[1],"size":3}"#),
        ]
    );
    let broken = StringArray::from(vec![r#"{"price":"#]);
    assert!(merge_extra(&broken, &[&price], &[]).is_err());
    assert!(promote(&broken, &[&price]).is_err());
    Ok(())
}

#[test]
fn properties_of_all() -> Result<(), Box<dyn std::error::Error>> {
    let fields = [
        field(2, schema::USER, FieldType::Text),
        field(4, "_device_id", FieldType::Text),
        field(10, schema::EXTRA, FieldType::Jsonb),
        field(16, "price", FieldType::Float8),
        field(17, "absent", FieldType::Float8),
    ];
    let text = |values: Vec<Option<&str>>| -> ArrayRef { Arc::new(StringArray::from(values)) };
    let batch = RecordBatch::try_new(
        Arc::new(ArrowSchema::new(
            fields[..4].iter().map(Field::arrow).collect::<Vec<_>>(),
        )),
        vec![
            text(vec![Some("u"), None]),
            text(vec![Some("d"), None]),
            text(vec![Some(r#"{"x":[1],"price":"old"}"#), None]),
            Arc::new(Float64Array::from(vec![Some(2.0), None])),
        ],
    )?;
    let shown = properties(&batch, &fields)?;
    assert_eq!(
        texts(&shown),
        [Some(r#"{"x":[1],"_device_id":"d","price":2}"#), Some("{}")]
    );
    Ok(())
}

#[test]
fn what_was_dropped_is_stripped_from_older_rows_only() -> Result<(), EventError> {
    let dropped = [DroppedField {
        name: "color".to_owned(),
        xid: 10,
        at_us: 1_000,
        own_since_us: i64::MIN,
    }];
    let text = r#"{"color":"red","n":1}"#;
    let only = r#"{"color":"red"}"#;
    let other = r#"{"colors":"color"}"#;
    let extra = StringArray::from(vec![
        Some(text),
        Some(only),
        Some(text),
        Some(text),
        Some(other),
        None,
    ]);
    let xid = Int64Array::from(vec![9, 9, 11, 9, 9, 9]);
    let at = TimestampMicrosecondArray::from(vec![999, 1_000, 500, 1_001, 999, 999]);
    assert_eq!(
        texts(&strip(&extra, &xid, &at, &dropped)?),
        [
            Some(r#"{"n":1}"#),
            None,
            Some(text),
            Some(text),
            Some(other),
            None
        ]
    );
    Ok(())
}
