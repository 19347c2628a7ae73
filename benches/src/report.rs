//! Figures: their values, their runs, the table and the files they end in.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result, system};
use crate::stats::Summary;

/// Which way is an improvement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// Less is better.
    Lower,
    /// More is better.
    Higher,
}

/// One run: its value, and what else was measured beside it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Run {
    value: f64,
    #[serde(flatten)]
    beside: Map<String, Value>,
}

impl Run {
    /// A run with nothing beside it.
    pub(crate) fn new(value: f64) -> Self {
        Self { value: rounded(value), beside: Map::new() }
    }

    /// Adds how it came about.
    pub(crate) fn noted(mut self, name: &str, word: &str) -> Self {
        self.beside.insert(name.to_owned(), word.into());
        self
    }

    /// Adds what was measured beside it, under a name that ends in its unit.
    pub(crate) fn beside(mut self, name: &str, value: f64) -> Self {
        self.beside.insert(name.to_owned(), rounded(value).into());
        self
    }
}

/// One figure of the results.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    id: String,
    value: f64,
    unit: &'static str,
    target: Option<f64>,
    better: Better,
    met: Option<bool>,
    runs: Vec<Run>,
}

impl Figure {
    /// A figure without a target over `runs`.
    ///
    /// # Errors
    /// There are no runs: a figure is never invented.
    pub(crate) fn new(
        id: impl Into<String>,
        unit: &'static str,
        better: Better,
        summary: Summary,
        runs: Vec<Run>,
    ) -> Result<Self> {
        let values: Vec<f64> = runs.iter().map(|run| run.value).collect();
        let value = summary.of(&values).ok_or(Error::Lacks("runs"))?;
        Self::with_value(id, value, unit, better, runs)
    }

    /// A figure whose value is not one of a summary over its runs.
    ///
    /// # Errors
    /// The value is no number.
    pub(crate) fn with_value(
        id: impl Into<String>,
        value: f64,
        unit: &'static str,
        better: Better,
        runs: Vec<Run>,
    ) -> Result<Self> {
        if !value.is_finite() {
            return Err(Error::Lacks("finite value"));
        }
        let value = rounded(value);
        Ok(Self { id: id.into(), value, unit, target: None, better, met: None, runs })
    }

    /// Sets the target, and with it whether it is met.
    pub(crate) fn target(mut self, target: f64) -> Self {
        self.target = Some(target);
        self.met = Some(match self.better {
            Better::Lower => self.value <= target,
            Better::Higher => self.value >= target,
        });
        self
    }

    /// Its value, for one that is compared with it.
    pub(crate) fn value(&self) -> f64 {
        self.value
    }

    fn row(&self) -> [String; 5] {
        let target = self.target.map_or(String::new(), |target| {
            let sign = if self.better == Better::Lower { "<=" } else { ">=" };
            format!("{sign} {target}")
        });
        let met = match self.met {
            None => "",
            Some(true) => "met",
            Some(false) => "MISSED",
        };
        let value = format!("{} {}", self.value, self.unit);
        [self.id.clone(), value.trim_end().to_owned(), target, met.to_owned(), self.runs.len().to_string()]
    }
}

/// Three decimals: what is beyond them is noise in all of these units.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// The figures as lines of a table.
pub(crate) fn table(figures: &[Figure]) -> Vec<String> {
    let head = ["FIGURE", "VALUE", "TARGET", "", "RUNS"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(head).chain(figures.iter().map(Figure::row)).collect();
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let line = |row: &[String; 5]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// The figures with all their runs.
pub(crate) fn document(figures: &[Figure]) -> Result<String> {
    serde_json::to_string_pretty(figures).map_err(|e| system("write", Path::new("the figures"))(e.into()))
}

/// Writes `latest.json` and a copy under the day's date into `folder`.
pub(crate) fn write(folder: &Path, figures: &[Figure]) -> Result<()> {
    let text = document(figures)? + "\n";
    fs::create_dir_all(folder).map_err(system("make", folder))?;
    let day = jiff::Zoned::now().date();
    for name in ["latest.json".to_owned(), format!("{day}.json")] {
        let path = folder.join(name);
        fs::write(&path, &text).map_err(system("write", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(better: Better) -> Figure {
        let runs = vec![Run::new(2.0), Run::new(1.0).beside("disk_mb_s", 320.123_49), Run::new(0.5)];
        Figure::new("take.x", "ms", better, Summary::Median, runs).unwrap()
    }

    #[test]
    fn a_target_is_met_on_its_own_side() {
        assert_eq!(figure(Better::Lower).met, None);
        assert_eq!(figure(Better::Lower).target(1.0).met, Some(true));
        assert_eq!(figure(Better::Lower).target(0.9).met, Some(false));
        assert_eq!(figure(Better::Higher).target(0.9).met, Some(true));
        assert_eq!(figure(Better::Higher).target(1.1).met, Some(false));
        assert!(Figure::new("x", "", Better::Lower, Summary::Median, Vec::new()).is_err());
    }

    #[test]
    fn the_file_has_the_fields_that_readers_rely_on() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[figure(Better::Lower).target(0.6)]).unwrap();
        let text = fs::read_to_string(folder.path().join("latest.json")).unwrap();
        let read: Value = serde_json::from_str(&text).unwrap();
        let expected = serde_json::json!([{
            "id": "take.x", "value": 1.0, "unit": "ms", "target": 0.6, "better": "lower", "met": false,
            "runs": [{ "value": 2.0 }, { "value": 1.0, "disk_mb_s": 320.123 }, { "value": 0.5 }],
        }]);
        assert_eq!(read, expected);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_table_says_what_is_missed() {
        let lines = table(&[figure(Better::Lower).target(0.6), figure(Better::Lower)]);
        assert_eq!(
            lines,
            [
                "FIGURE  VALUE  TARGET          RUNS",
                "take.x  1 ms   <= 0.6  MISSED  3",
                "take.x  1 ms                   3",
            ]
        );
    }
}
