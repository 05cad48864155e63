-- The tables and keys of three sample databases, without their rows and most of their columns:
-- Pagila, Northwind and Chinook, as their PostgreSQL versions define them.

CREATE SCHEMA pagila;
SET search_path = pagila;
CREATE TYPE mpaa_rating AS ENUM ('G', 'PG', 'PG-13', 'R', 'NC-17');
CREATE DOMAIN year AS integer CHECK (VALUE BETWEEN 1901 AND 2155);
CREATE TABLE language (language_id serial PRIMARY KEY, name char(20) NOT NULL);
CREATE TABLE category (category_id serial PRIMARY KEY, name text NOT NULL);
CREATE TABLE actor (actor_id serial PRIMARY KEY, first_name text, last_name text);
CREATE TABLE film (
  film_id serial PRIMARY KEY, title text NOT NULL, release_year year,
  language_id int NOT NULL REFERENCES language, original_language_id int REFERENCES language,
  rental_rate numeric(4, 2) NOT NULL DEFAULT 4.99, rating mpaa_rating DEFAULT 'G',
  special_features text[], fulltext tsvector NOT NULL
);
CREATE TABLE film_actor (
  actor_id int REFERENCES actor, film_id int REFERENCES film,
  last_update timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (actor_id, film_id)
);
CREATE TABLE film_category (
  film_id int REFERENCES film, category_id int REFERENCES category,
  last_update timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (film_id, category_id)
);
CREATE TABLE country (country_id serial PRIMARY KEY, country text NOT NULL);
CREATE TABLE city (city_id serial PRIMARY KEY, country_id int NOT NULL REFERENCES country);
CREATE TABLE address (address_id serial PRIMARY KEY, city_id int NOT NULL REFERENCES city);
CREATE TABLE store (
  store_id serial PRIMARY KEY, manager_staff_id int NOT NULL UNIQUE,
  address_id int NOT NULL REFERENCES address
);
CREATE TABLE staff (
  staff_id serial PRIMARY KEY, address_id int NOT NULL REFERENCES address, email text,
  store_id int NOT NULL REFERENCES store, active boolean NOT NULL DEFAULT true,
  username text NOT NULL, password text, picture bytea
);
ALTER TABLE store ADD FOREIGN KEY (manager_staff_id) REFERENCES staff;
CREATE TABLE customer (
  customer_id serial PRIMARY KEY, store_id int NOT NULL REFERENCES store, email text,
  address_id int NOT NULL REFERENCES address, create_date date NOT NULL DEFAULT current_date
);
CREATE TABLE inventory (
  inventory_id serial PRIMARY KEY, film_id int NOT NULL REFERENCES film,
  store_id int NOT NULL REFERENCES store
);
CREATE TABLE rental (
  rental_id serial PRIMARY KEY, rental_period tstzrange NOT NULL,
  inventory_id int NOT NULL REFERENCES inventory, customer_id int NOT NULL REFERENCES customer,
  staff_id int NOT NULL REFERENCES staff
);
CREATE TABLE payment (
  payment_id serial NOT NULL, customer_id int NOT NULL, staff_id int NOT NULL,
  rental_id int NOT NULL, amount numeric(5, 2) NOT NULL, payment_date timestamptz NOT NULL,
  PRIMARY KEY (payment_date, payment_id)
) PARTITION BY RANGE (payment_date);
CREATE TABLE payment_p2022_01 PARTITION OF payment (
  FOREIGN KEY (customer_id) REFERENCES customer, FOREIGN KEY (rental_id) REFERENCES rental
) FOR VALUES FROM ('2022-01-01') TO ('2022-02-01');
CREATE TABLE payment_p2022_02 PARTITION OF payment FOR VALUES FROM ('2022-02-01') TO ('2022-03-01');
CREATE VIEW customer_list AS SELECT customer_id AS id, email FROM customer;
CREATE VIEW sales_by_store AS SELECT store_id AS store, count(*) FROM staff GROUP BY store_id;
CREATE MATERIALIZED VIEW rental_by_category AS SELECT name AS category FROM category;

CREATE SCHEMA northwind;
SET search_path = northwind;
CREATE TABLE categories (category_id smallint PRIMARY KEY, picture bytea);
CREATE TABLE customer_demographics (customer_type_id varchar(5) PRIMARY KEY, customer_desc text);
CREATE TABLE customers (customer_id varchar(5) PRIMARY KEY, company_name varchar(40) NOT NULL);
CREATE TABLE customer_customer_demo (
  customer_id varchar(5) REFERENCES customers,
  customer_type_id varchar(5) REFERENCES customer_demographics,
  PRIMARY KEY (customer_id, customer_type_id)
);
CREATE TABLE employees (
  employee_id smallint PRIMARY KEY, last_name varchar(20) NOT NULL,
  reports_to smallint REFERENCES employees
);
CREATE TABLE suppliers (supplier_id smallint PRIMARY KEY, company_name varchar(40) NOT NULL);
CREATE TABLE products (
  product_id smallint PRIMARY KEY, supplier_id smallint REFERENCES suppliers,
  category_id smallint REFERENCES categories, unit_price real
);
CREATE TABLE region (region_id smallint PRIMARY KEY, region_description varchar(60) NOT NULL);
CREATE TABLE shippers (shipper_id smallint PRIMARY KEY, company_name varchar(40) NOT NULL);
CREATE TABLE orders (
  order_id smallint PRIMARY KEY, customer_id varchar(5) REFERENCES customers,
  employee_id smallint REFERENCES employees, ship_via smallint REFERENCES shippers
);
CREATE TABLE territories (
  territory_id varchar(20) PRIMARY KEY, region_id smallint NOT NULL REFERENCES region
);
CREATE TABLE employee_territories (
  employee_id smallint REFERENCES employees, territory_id varchar(20) REFERENCES territories,
  PRIMARY KEY (employee_id, territory_id)
);
CREATE TABLE order_details (
  order_id smallint REFERENCES orders, product_id smallint REFERENCES products,
  unit_price real NOT NULL, quantity smallint NOT NULL, discount real NOT NULL,
  PRIMARY KEY (order_id, product_id)
);
CREATE TABLE us_states (state_id smallint PRIMARY KEY, state_abbr varchar(2));

CREATE SCHEMA chinook;
SET search_path = chinook;
CREATE TABLE artist (artist_id int PRIMARY KEY, name varchar(120));
CREATE TABLE album (album_id int PRIMARY KEY, artist_id int NOT NULL REFERENCES artist);
CREATE TABLE employee (
  employee_id int PRIMARY KEY, reports_to int REFERENCES employee, email varchar(60)
);
CREATE TABLE customer (
  customer_id int PRIMARY KEY, email varchar(60) NOT NULL, support_rep_id int REFERENCES employee
);
CREATE TABLE invoice (
  invoice_id int PRIMARY KEY, customer_id int NOT NULL REFERENCES customer, total numeric(10, 2)
);
CREATE TABLE genre (genre_id int PRIMARY KEY, name varchar(120));
CREATE TABLE media_type (media_type_id int PRIMARY KEY, name varchar(120));
CREATE TABLE track (
  track_id int PRIMARY KEY, album_id int REFERENCES album, genre_id int REFERENCES genre,
  media_type_id int NOT NULL REFERENCES media_type, unit_price numeric(10, 2) NOT NULL
);
CREATE TABLE invoice_line (
  invoice_line_id int PRIMARY KEY, invoice_id int NOT NULL REFERENCES invoice,
  track_id int NOT NULL REFERENCES track, quantity int NOT NULL
);
CREATE TABLE playlist (playlist_id int PRIMARY KEY, name varchar(120));
CREATE TABLE playlist_track (
  playlist_id int REFERENCES playlist, track_id int REFERENCES track,
  PRIMARY KEY (playlist_id, track_id)
);
