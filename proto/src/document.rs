//! Errors of TOML documents that people write: which line, and why.

/// A document that is not what its schema asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// Not TOML, an unknown key or a wrong type; the text names line and column and shows the line.
    #[error("{0}")]
    Toml(String),
}

/// Most lines, and characters of a line, that an error repeats of a document: it travels in a
/// message's header, and the document may be anything.
const LINES_MAX: usize = 8;
const LINE_MAX: usize = 120;

impl From<toml::de::Error> for DocumentError {
    fn from(error: toml::de::Error) -> Self {
        let text = error.to_string();
        let lines = text.trim_end().lines().take(LINES_MAX).map(|line| {
            let mut short: String = line.chars().take(LINE_MAX).collect();
            short.retain(|c| !c.is_control());
            if line.chars().nth(LINE_MAX).is_some() {
                short.push('…');
            }
            short
        });
        Self::Toml(lines.collect::<Vec<_>>().join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use crate::VmSpec;

    #[test]
    fn an_error_repeats_little_of_a_document() {
        for document in
            ["a".repeat(1 << 20), "\0".repeat(5000), format!("x = \"{}\"", "ä".repeat(9000))]
        {
            let error = VmSpec::parse(&document).unwrap_err().to_string();
            assert!(error.len() < 4096, "{} bytes", error.len());
            assert!(error.contains("line 1"), "{error}");
            assert!(error.chars().all(|c| c == '\n' || !c.is_control()));
        }
    }
}
