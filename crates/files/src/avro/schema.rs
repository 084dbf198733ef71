//! Avro schemas, as far as reading needs them.

use std::collections::HashMap;

use rakam_event::types::FieldType;
use serde_json::Value;

/// Definitions and nesting of a schema, at most.
const MAX_TYPES: usize = 100_000;
const MAX_DEPTH: usize = 64;
/// The size of a fixed type, at most.
const MAX_FIXED: u64 = 1 << 20;

/// What the bytes of a value are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    Null,
    Bool,
    Int,
    Long,
    Float,
    Double,
    Bytes,
    Text,
    Fixed(usize),
    Enum(Vec<String>),
    Array(Box<Shape>),
    Map(Box<Shape>),
    Record(Vec<(String, Shape)>),
    Union(Vec<Shape>),
    /// A type of [`Types::named`].
    Named(usize),
    Date,
    Time {
        per_second: i64,
    },
    Timestamp {
        per_second: i64,
    },
    /// In so many bytes; None: in as many as are said before it.
    Decimal {
        size: Option<usize>,
        scale: u8,
    },
    /// In 16 bytes.
    Uuid,
}

/// The types of a schema.
#[derive(Debug, Default)]
pub struct Types {
    root: Option<Shape>,
    named: Vec<Option<Shape>>,
    by_name: HashMap<String, usize>,
    parsed: usize,
}

impl Types {
    pub fn parse(schema: &[u8]) -> Result<Self, String> {
        let value: Value =
            serde_json::from_slice(schema).map_err(|e| format!("its schema is no JSON: {e}"))?;
        let mut types = Self::default();
        let root = types.shape(&value, "", 0)?;
        types.root = Some(root);
        Ok(types)
    }

    /// What the file's values are.
    pub fn root(&self) -> &Shape {
        let root = self.root.as_ref().unwrap_or(&Shape::Null);
        self.resolve(root)
    }

    pub fn named(&self, index: usize) -> Option<&Shape> {
        self.named.get(index)?.as_ref()
    }

    fn resolve<'a>(&'a self, shape: &'a Shape) -> &'a Shape {
        match shape {
            Shape::Named(index) => self.named(*index).unwrap_or(&Shape::Null),
            shape => shape,
        }
    }

    fn shape(&mut self, value: &Value, namespace: &str, depth: usize) -> Result<Shape, String> {
        self.parsed += 1;
        if depth > MAX_DEPTH || self.parsed > MAX_TYPES {
            return Err("its schema is too large".to_owned());
        }
        match value {
            Value::String(name) => self.named_shape(name, namespace),
            Value::Array(branches) => Ok(Shape::Union(
                branches
                    .iter()
                    .map(|branch| self.shape(branch, namespace, depth + 1))
                    .collect::<Result<_, _>>()?,
            )),
            Value::Object(_) => self.complex(value, namespace, depth),
            _ => Err("its schema has a type that is none".to_owned()),
        }
    }

    fn named_shape(&self, name: &str, namespace: &str) -> Result<Shape, String> {
        Ok(match name {
            "null" => Shape::Null,
            "boolean" => Shape::Bool,
            "int" => Shape::Int,
            "long" => Shape::Long,
            "float" => Shape::Float,
            "double" => Shape::Double,
            "bytes" => Shape::Bytes,
            "string" => Shape::Text,
            _ => {
                let full = full_name(name, namespace);
                let found = self.by_name.get(&full).or_else(|| self.by_name.get(name));
                Shape::Named(
                    *found.ok_or_else(|| format!("its schema lacks type \"{name:.100}\""))?,
                )
            }
        })
    }

    fn complex(&mut self, value: &Value, namespace: &str, depth: usize) -> Result<Shape, String> {
        let kind = match &value["type"] {
            Value::String(kind) => kind.as_str(),
            nested => return self.shape(nested, namespace, depth + 1),
        };
        let logical = value["logicalType"].as_str().unwrap_or_default();
        match kind {
            "array" => Ok(Shape::Array(Box::new(self.shape(
                &value["items"],
                namespace,
                depth + 1,
            )?))),
            "map" => Ok(Shape::Map(Box::new(self.shape(
                &value["values"],
                namespace,
                depth + 1,
            )?))),
            "record" | "error" | "enum" | "fixed" => self.definition(kind, value, namespace, depth),
            "bytes" if logical == "decimal" => Ok(Shape::Decimal {
                size: None,
                scale: scale(value),
            }),
            "int" if logical == "date" => Ok(Shape::Date),
            "int" if logical == "time-millis" => Ok(Shape::Time { per_second: 1000 }),
            "long" => Ok(match logical {
                "time-micros" => Shape::Time {
                    per_second: 1_000_000,
                },
                "timestamp-millis" | "local-timestamp-millis" => {
                    Shape::Timestamp { per_second: 1000 }
                }
                "timestamp-micros" | "local-timestamp-micros" => Shape::Timestamp {
                    per_second: 1_000_000,
                },
                "timestamp-nanos" | "local-timestamp-nanos" => Shape::Timestamp {
                    per_second: 1_000_000_000,
                },
                _ => Shape::Long,
            }),
            other => self.named_shape(other, namespace),
        }
    }

    /// A type with a name. It is known by it before its own parts are read: a record may contain itself.
    fn definition(
        &mut self,
        kind: &str,
        value: &Value,
        namespace: &str,
        depth: usize,
    ) -> Result<Shape, String> {
        let name = value["name"].as_str().unwrap_or_default();
        let own = value["namespace"].as_str().unwrap_or(namespace);
        let full = full_name(name, own);
        let inner = full
            .rsplit_once('.')
            .map_or("", |(space, _)| space)
            .to_owned();
        let index = self.named.len();
        self.named.push(None);
        self.by_name.insert(full, index);
        let list = |key: &str| value[key].as_array().map(Vec::as_slice).unwrap_or_default();
        let shape = match kind {
            "enum" => Shape::Enum(
                list("symbols")
                    .iter()
                    .map(|symbol| symbol.as_str().unwrap_or_default().to_owned())
                    .collect(),
            ),
            "fixed" => {
                let size = value["size"]
                    .as_u64()
                    .filter(|&size| size <= MAX_FIXED)
                    .ok_or("its schema has a fixed type of an impossible size")?
                    as usize;
                match value["logicalType"].as_str() {
                    Some("decimal") => Shape::Decimal {
                        size: Some(size),
                        scale: scale(value),
                    },
                    Some("uuid") if size == 16 => Shape::Uuid,
                    _ => Shape::Fixed(size),
                }
            }
            _ => {
                let mut fields = Vec::new();
                for field in list("fields") {
                    let name = field["name"]
                        .as_str()
                        .ok_or("its schema has a field without name")?;
                    let shape = self.shape(&field["type"], &inner, depth + 1)?;
                    fields.push((name.to_owned(), shape));
                }
                Shape::Record(fields)
            }
        };
        self.named[index] = Some(shape);
        Ok(Shape::Named(index))
    }

    /// The type that a field of this shape gets; None where the values decide.
    pub fn field_type(&self, shape: &Shape) -> Option<FieldType> {
        Some(match self.resolve(shape) {
            Shape::Null => return None,
            Shape::Bool => FieldType::Bool,
            Shape::Int => FieldType::Int4,
            Shape::Long => FieldType::Int8,
            Shape::Float => FieldType::Float4,
            Shape::Double => FieldType::Float8,
            Shape::Date => FieldType::Date,
            Shape::Timestamp { .. } => FieldType::Timestamptz,
            Shape::Uuid => FieldType::Uuid,
            Shape::Decimal { scale, .. } => FieldType::Numeric {
                precision: 38,
                scale: *scale,
            },
            Shape::Array(item) => match self.field_type(item) {
                Some(FieldType::Bool) => FieldType::BoolArray,
                Some(FieldType::Float8 | FieldType::Float4 | FieldType::Int4) => {
                    FieldType::Float8Array
                }
                Some(FieldType::Text) => FieldType::TextArray,
                _ => FieldType::Jsonb,
            },
            Shape::Map(_) | Shape::Record(_) | Shape::Named(_) => FieldType::Jsonb,
            Shape::Union(branches) => {
                let mut types = branches.iter().filter_map(|branch| match branch {
                    // Unions of unions are not allowed: this ends.
                    Shape::Union(_) => Some(FieldType::Jsonb),
                    branch => self.field_type(branch),
                });
                let first = types.next()?;
                if types.any(|ty| ty != first) {
                    FieldType::Jsonb
                } else {
                    first
                }
            }
            Shape::Bytes | Shape::Text | Shape::Fixed(_) | Shape::Enum(_) | Shape::Time { .. } => {
                FieldType::Text
            }
        })
    }
}

fn full_name(name: &str, namespace: &str) -> String {
    if name.contains('.') || namespace.is_empty() {
        name.to_owned()
    } else {
        format!("{namespace}.{name}")
    }
}

/// The scale of a decimal; one that no numeric field has counts as none.
fn scale(value: &Value) -> u8 {
    value["scale"]
        .as_u64()
        .and_then(|scale| u8::try_from(scale).ok())
        .filter(|&scale| scale <= 38)
        .unwrap_or(0)
}
