//! The text that describes a volume group: sections in braces, numbers, strings and lists of them.
//! [lvm2 libdm/libdm-config.c]

use std::collections::BTreeMap;

use crate::guest::Trouble;

/// Braces inside of braces. The deepest that there are: group, volumes, volume, segment, settings.
const MAX_DEPTH: usize = 16;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    /// `name { ... }`
    Section(Section),
    /// `name = value`; a list has any number of values, anything else one.
    Values(Vec<Value>),
}

/// Names and what they stand for, each once.
pub(super) type Section = BTreeMap<String, Node>;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// A whole number.
    Number(i64),
    /// A string.
    Text(String),
    /// A number with a point: nothing that is read here has one.
    Fraction,
}

/// Reads all of `text`, up to the first NUL.
///
/// # Errors
/// [`Trouble::Skip`] where it is malformed, or says something twice.
pub(super) fn parse(text: &[u8]) -> Result<Section, Trouble> {
    let end = text.iter().position(|byte| *byte == 0);
    let text = text.get(..end.unwrap_or(text.len())).unwrap_or_default();
    let mut parser = Parser { text, at: 0 };
    let section = parser.section(0)?;
    match parser.peek() {
        None => Ok(section),
        Some(_) => Err(parser.malformed()),
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn malformed(&self) -> Trouble {
        Trouble::skip(format!(
            "has metadata that is malformed at byte {}",
            self.at
        ))
    }

    /// The next byte that is neither space nor comment.
    fn peek(&mut self) -> Option<u8> {
        let mut comment = false;
        while let Some(&byte) = self.text.get(self.at) {
            match byte {
                b'\n' => comment = false,
                b'#' => comment = true,
                byte if comment || byte.is_ascii_whitespace() => {}
                byte => return Some(byte),
            }
            self.at += 1;
        }
        None
    }

    fn expect(&mut self, wanted: u8) -> Result<(), Trouble> {
        if self.peek() != Some(wanted) {
            return Err(self.malformed());
        }
        self.at += 1;
        Ok(())
    }

    /// Entries up to the brace that closes the section, or the end of the text.
    fn section(&mut self, depth: usize) -> Result<Section, Trouble> {
        if depth > MAX_DEPTH {
            return Err(self.malformed());
        }
        let mut section = Section::new();
        while let Some(byte) = self.peek() {
            if byte == b'}' {
                break;
            }
            let name = self.word(|byte| !byte.is_ascii_whitespace() && !b"#={}".contains(&byte));
            let name = name.ok_or_else(|| self.malformed())?;
            let node = if self.peek() == Some(b'{') {
                self.at += 1;
                let inner = self.section(depth + 1)?;
                self.expect(b'}')?;
                Node::Section(inner)
            } else {
                self.expect(b'=')?;
                Node::Values(self.values()?)
            };
            if section.contains_key(&name) {
                return Err(Trouble::skip(format!(
                    "has metadata that says {name} twice"
                )));
            }
            section.insert(name, node);
        }
        Ok(section)
    }

    fn values(&mut self) -> Result<Vec<Value>, Trouble> {
        if self.peek() != Some(b'[') {
            return Ok(vec![self.value()?]);
        }
        self.at += 1;
        let mut values = Vec::new();
        while self.peek() != Some(b']') {
            values.push(self.value()?);
            if self.peek() == Some(b',') {
                self.at += 1;
            }
        }
        self.expect(b']')?;
        Ok(values)
    }

    fn value(&mut self) -> Result<Value, Trouble> {
        if self.peek() == Some(b'"') {
            self.at += 1;
            return self.string().map(Value::Text);
        }
        let word = self.word(|byte| byte.is_ascii_digit() || b"+-.".contains(&byte));
        let word = word.ok_or_else(|| self.malformed())?;
        if word.contains('.') {
            return Ok(Value::Fraction);
        }
        word.parse()
            .map(Value::Number)
            .map_err(|_| self.malformed())
    }

    /// The rest of a string whose opening quote was read.
    fn string(&mut self) -> Result<String, Trouble> {
        let mut bytes = Vec::new();
        loop {
            let byte = self.text.get(self.at).copied();
            self.at += 1;
            match byte {
                Some(b'"') => break,
                Some(b'\\') => {
                    bytes.extend(self.text.get(self.at));
                    self.at += 1;
                }
                Some(byte) => bytes.push(byte),
                None => return Err(self.malformed()),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn word(&mut self, belongs: impl Fn(u8) -> bool) -> Option<String> {
        let rest = self.text.get(self.at..)?;
        let len = rest.iter().position(|byte| !belongs(*byte));
        let word = rest.get(..len.unwrap_or(rest.len()))?;
        self.at += word.len();
        (!word.is_empty()).then(|| String::from_utf8_lossy(word).into_owned())
    }
}

/// The section of that name.
pub(super) fn section<'a>(all: &'a Section, name: &str) -> Option<&'a Section> {
    match all.get(name)? {
        Node::Section(section) => Some(section),
        Node::Values(_) => None,
    }
}

/// The values of that name.
pub(super) fn list<'a>(all: &'a Section, name: &str) -> Option<&'a [Value]> {
    match all.get(name)? {
        Node::Values(values) => Some(values),
        Node::Section(_) => None,
    }
}

/// The one number of that name, if it is not negative.
pub(super) fn number(all: &Section, name: &str) -> Option<u64> {
    match list(all, name)? {
        [Value::Number(number)] => u64::try_from(*number).ok(),
        _ => None,
    }
}

/// The one string of that name.
pub(super) fn text<'a>(all: &'a Section, name: &str) -> Option<&'a str> {
    match list(all, name)? {
        [Value::Text(text)] => Some(text),
        _ => None,
    }
}

/// The strings of that name. `None` where there is none of the name or one of them is no string.
pub(super) fn texts<'a>(all: &'a Section, name: &str) -> Option<Vec<&'a str>> {
    (list(all, name)?.iter())
        .map(|value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_what_is_malformed() {
        let parse = |text: &str| super::parse(text.as_bytes());
        let all = parse("a=1 b = [ 'no' ]").err();
        assert!(all.is_some(), "single quotes");
        let all = parse("a=-1# c\nb{c=[\"x\",2 3.5,]}d = []\0rubbish {").unwrap();
        assert_eq!(list(&all, "a"), Some(&[Value::Number(-1)][..]));
        assert_eq!(number(&all, "a"), None);
        let inner = section(&all, "b").unwrap();
        let values = [
            Value::Text("x".to_owned()),
            Value::Number(2),
            Value::Fraction,
        ];
        assert_eq!(inner.get("c"), Some(&Node::Values(values.to_vec())));
        assert_eq!(texts(inner, "c"), None);
        let escaped = parse(r#"a = "\"\\\n""#).unwrap();
        assert_eq!(text(&escaped, "a"), Some("\"\\n"));
        for wrong in [
            "a",
            "a {",
            "a }",
            "}",
            "a = ",
            "a = [",
            "a = [1",
            "a = \"x",
            "a = \"x\\",
            "a = 1 2",
            "= 1",
            "a = 99999999999999999999",
            "a = 1-",
            "a = x",
            "a {} a {}",
            "a = {}",
            "[1]",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse(&"a {".repeat(100_000)).is_err());
        assert!(parse(&format!("{}{}", "a {".repeat(15), "}".repeat(15))).is_ok());
    }
}
